//! What a secure tuning run is going to do, and about how long it takes.

use super::data::Asked;
use super::stages::Origin;
use super::{SecureJob, SecureRun};
use crate::backend::{Backend, Roofline};
use crate::data::Example;
use crate::engine::{Plan, Workload};
use crate::error::Result;
use crate::secure::loaded::REFUSAL_TOKENS;
use crate::secure::text::ModelText;
use crate::secure::tune::{Method, TuneJob};
use crate::train::Length;
use std::time::Instant;

/// Shares of the measured peak that training, generation and reading are taken to reach. What a machine does is measured
/// as the run goes on.
const TRAINING: f64 = 0.5;
const GENERATION: f64 = 0.15;
const READING: f64 = 0.4;

/// A stage of the run.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct PlannedStage {
    /// What it does.
    pub name: String,
    /// A rough estimate from FLOPs and the measured peak, in seconds.
    pub seconds: f64,
    /// Whether it may turn out not to be needed.
    pub optional: bool,
}

impl PlannedStage {
    fn new(name: &str, seconds: f64) -> Self {
        Self { name: name.into(), seconds, optional: false }
    }

    fn optional(self) -> Self {
        Self { optional: true, ..self }
    }
}

/// A run before it begins.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct SecurePlan {
    /// Stages in order.
    pub stages: Vec<PlannedStage>,
    /// Memory of the largest stage, in bytes.
    pub memory_bytes: u64,
    /// Disk space of the working folder and the output, in bytes.
    pub disk_bytes: u64,
}

impl SecurePlan {
    /// Seconds of all stages, and of those that are needed in any case.
    pub fn seconds(&self) -> (f64, f64) {
        let sum = |stages: &dyn Fn(&&PlannedStage) -> bool| self.stages.iter().filter(stages).map(|s| s.seconds).sum();
        (sum(&|_| true), sum(&|stage| !stage.optional))
    }
}

/// Rates of the model on this machine.
struct Rates {
    /// Seconds a token of training, generating and reading.
    train: f64,
    generate: f64,
    read: f64,
}

impl<B: Backend> SecureRun<'_, B> {
    /// The stages with rough times.
    ///
    /// # Errors
    /// A device that fails.
    pub fn plan(&self) -> Result<SecurePlan> {
        let peak = Roofline::measure(&self.backend)?.flops_per_s;
        let plans: Vec<Plan> =
            self.tunings.iter().map(|tuning| plan::<B>(&self.text, &tuning.job, &self.data.train)).collect();
        let mut stages = Vec::new();
        let rates: Vec<Rates> = plans
            .iter()
            .map(|plan| Rates {
                train: (plan.forward_flops + plan.backward_flops) / (TRAINING * peak),
                generate: plan.forward_flops / (GENERATION * peak),
                read: plan.forward_flops / (READING * peak),
            })
            .collect();
        let Some(first) = rates.first() else { return Ok(SecurePlan::default()) };
        let valid = self.measure_seconds(first, &self.data.valid);
        let test = self.measure_seconds(first, &self.data.test);
        if self.job.adapter.is_some() {
            stages.push(PlannedStage::new("merge the adapter into the model", 0.0));
        }
        if self.screens() {
            let train = &self.data.train;
            let tokens: usize = train.iter().map(|example| example.tokens.len()).sum();
            let answers = (train.len() * REFUSAL_TOKENS) as f64;
            let seconds = tokens as f64 * first.read + answers * first.generate;
            stages.push(PlannedStage::new("screen the data", seconds));
        }
        stages.push(PlannedStage::new("measure the original model, selection prompts", valid));
        stages.push(PlannedStage::new("measure the original model, verdict prompts", test));
        if self.replays() {
            let prompts = self.data.security.iter().filter(|prompt| prompt.split == crate::data::Split::Train).count();
            let tokens = (prompts * self.replay_options().answer_tokens) as f64;
            stages.push(PlannedStage::new("own answers, to be replayed", tokens * first.generate));
        }
        for (i, (tuning, rates)) in self.tunings.iter().zip(&rates).enumerate() {
            let tokens = self.trained_tokens(&tuning.job) / (1.0 - tuning.mixed());
            let pair = [("tune", tokens * rates.train), ("measure", valid)];
            let pair = pair.map(|(what, seconds)| PlannedStage::new(&format!("{what} {}", tuning.name), seconds));
            stages.extend(pair.map(|stage| if i > 0 { stage.optional() } else { stage }));
        }
        let points = super::POINTS.len() as f64;
        stages.push(
            PlannedStage::new("measure points of the path towards the original model", points * valid).optional(),
        );
        stages.push(PlannedStage::new("write the model", 0.0));
        stages.push(PlannedStage::new("measure the tuned model, verdict prompts", test));
        let memory_bytes = plans.iter().map(Plan::total_bytes).max().unwrap_or(0);
        let stored = self.text.files.stored_bytes(self.job.save_dtype)?;
        let models = self.tunings.len() as u64 + 1 + u64::from(self.job.adapter.is_some());
        // A tuned model each, a checkpoint of the one that runs (weights and moments), the output, and the merged model.
        let checkpoint = plans.iter().map(|plan| plan.weights_bytes + plan.moments_bytes).max().unwrap_or(0);
        let disk_bytes = stored * models + 2 * checkpoint;
        Ok(SecurePlan { stages, memory_bytes, disk_bytes })
    }

    fn measure_seconds(&self, rates: &Rates, asked: &Asked) -> f64 {
        let options = &self.job.evaluate;
        let answers = asked.prompts.len() * options.answer_tokens + asked.tasks.len() * options.task_tokens;
        let read: usize = asked.heldout.iter().map(|example| example.tokens.len()).sum();
        // Prompts are read once for the answers and once for the log-odds.
        let prompts = 2 * 40 * asked.prompts.len() + 60 * asked.tasks.len();
        answers as f64 * rates.generate + (read + prompts) as f64 * rates.read
    }

    /// Tokens of all steps.
    fn trained_tokens(&self, job: &TuneJob) -> f64 {
        let tokens: usize = self.data.train.iter().map(|example| example.tokens.len()).sum();
        let mean = tokens as f64 / self.data.train.len().max(1) as f64;
        let shared = &job.recipe.shared;
        let step = (shared.batch_size * shared.grad_accum) as f64 * mean;
        let phases = [Some(&job.recipe.all_phase), job.mods.as_ref().map(|_| &job.recipe.mods_phase)];
        let length = |phase: &crate::train::PhaseOptions| match phase.length() {
            Ok(Length::Steps(steps)) => steps as f64 * step,
            Ok(Length::Epochs(epochs)) => epochs as f64 * tokens as f64,
            Err(_) => 0.0,
        };
        phases.into_iter().flatten().map(length).sum()
    }
}

/// Memory and FLOPs of a tuning run.
fn plan<B: Backend>(text: &ModelText, job: &TuneJob, train: &[Example]) -> Plan {
    let shared = &job.recipe.shared;
    let longest = train.iter().map(|example| example.tokens.len()).max().unwrap_or(1);
    let lora = match &job.recipe.method {
        Method::Lora { lora, .. } => Some(*lora),
        Method::Full | Method::Adapter { .. } => None,
    };
    let work = Workload {
        tokens: shared.batch_size * longest,
        document_tokens: longest,
        trained_share: crate::data::DataSize::of(train).trained_share,
        recompute: shared.recompute,
        lora,
        beside: shared.beside::<B>(),
    };
    let adapter = |id: crate::modules::ParamId| {
        use crate::modules::ParamId::{LoraA, LoraB};
        matches!(id, LoraA(_) | LoraB(_)) == lora.is_some()
    };
    Plan::new::<B>(&text.files.config, &work, adapter)
}

/// A stage that a run has gone through.
#[derive(Clone, Debug, PartialEq)]
pub struct StageTime {
    /// What it did, as in the plan.
    pub name: String,
    /// Seconds that it took; none where its result is kept from an earlier run.
    pub seconds: Option<f64>,
}

/// Time that is left, by the plan and by how the stages so far compare with it.
pub(super) struct Clocked {
    planned: Vec<f64>,
    stage: usize,
    began: Instant,
    /// Planned and real seconds of the stages that were worked on.
    spent: (f64, f64),
    times: Vec<StageTime>,
}

impl Clocked {
    pub(super) fn new(plan: &SecurePlan) -> Self {
        let planned = plan.stages.iter().map(|stage| stage.seconds).collect();
        Self { planned, stage: 0, began: Instant::now(), spent: (0.0, 0.0), times: Vec::new() }
    }

    /// Begins the next stage: its number, their count, and the seconds that are left with it.
    pub(super) fn begin(&mut self, name: &str) -> (usize, usize, f64) {
        let ratio = if self.spent.0 > 0.0 { self.spent.1 / self.spent.0 } else { 1.0 };
        let left: f64 = self.planned.iter().skip(self.stage).sum();
        self.times.push(StageTime { name: name.into(), seconds: None });
        self.began = Instant::now();
        self.stage += 1;
        (self.stage, self.planned.len(), left * ratio)
    }

    /// Ends a stage; one from the cache, or without an estimate, says nothing about the machine.
    pub(super) fn end(&mut self, origin: Origin) {
        if origin == Origin::Kept {
            return;
        }
        let seconds = self.began.elapsed().as_secs_f64();
        if let Some(time) = self.times.last_mut() {
            time.seconds = Some(seconds);
        }
        let planned = self.planned.get(self.stage.wrapping_sub(1)).copied().unwrap_or_default();
        if planned > 0.0 {
            self.spent = (self.spent.0 + planned, self.spent.1 + seconds);
        }
    }

    /// Leaves out stages that are not needed.
    pub(super) fn skip(&mut self, stages: usize) {
        self.stage += stages;
    }

    /// The stages so far.
    pub(super) fn times(self) -> Vec<StageTime> {
        self.times
    }
}

impl SecureJob {
    /// Name of the working folder, if it is not given: `OUT.work`.
    pub fn default_work(out: &std::path::Path) -> std::path::PathBuf {
        let mut name = out.file_name().unwrap_or_default().to_owned();
        name.push(".work");
        out.with_file_name(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_stages_that_were_worked_on() {
        let stage = |seconds| PlannedStage::new("planned", seconds);
        let plan =
            SecurePlan { stages: vec![stage(0.0), stage(10.0), stage(20.0), stage(30.0)], ..SecurePlan::default() };
        let mut clock = Clocked::new(&plan);
        assert_eq!(clock.begin("write"), (1, 4, 60.0));
        clock.end(Origin::Made);
        // Nothing was planned for the first stage: it does not correct the others.
        assert_eq!(clock.begin("kept"), (2, 4, 60.0));
        clock.end(Origin::Kept);
        clock.skip(1);
        clock.spent = (10.0, 20.0);
        assert_eq!(clock.begin("last"), (4, 4, 60.0));
        clock.end(Origin::Made);
        let times = clock.times();
        assert_eq!(times.iter().map(|time| time.name.as_str()).collect::<Vec<_>>(), ["write", "kept", "last"]);
        assert_eq!(times.iter().map(|time| time.seconds.is_some()).collect::<Vec<_>>(), [true, false, true]);
    }
}
