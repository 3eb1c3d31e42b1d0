//! The order of the stages, the choice and the verdict.

use super::advice::NotHeld;
use super::estimate::{Clocked, SecurePlan, StageTime};
use super::stages::{Origin, Subject, Tuned};
use super::{BaseModel, POINTS, SecureMeasures, SecureOutcome, SecureRun, SecureSetting, Tried, license_of};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::io::{IfExists, OutputDir, json};
use crate::model::{ModelDir, StoredAs};
use crate::progress::Observer;
use crate::secure::check::{Check, Limits, Verdict};
use crate::secure::choice::{Candidate, choose, excess};
use crate::secure::eval::Evaluation;
use crate::secure::merge::{Alpha, MergeMethod, MergeModels, MergeOptions, merge, merge_into};
use crate::secure::screen::{SCREENED_FILE, write_screened};
use crate::secure::study::{Stages, claim_folder, clock, file_hash, lock};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

/// The model with its adapter merged, in the working folder; name of its stage.
const MERGED: &str = "merged";

/// A finished run, whose output is complete but for what else is to lie in it.
pub struct Secured {
    /// What was found.
    pub outcome: SecureOutcome,
    /// Measures of both models and the verdict, as of `swat check`.
    pub check: Check,
    /// The output, with the model and `outcome.json` in it, to be committed.
    pub output: OutputDir,
    /// The stages, with their times.
    pub times: Vec<StageTime>,
}

/// Where the run reports to.
pub struct Report<'a> {
    /// Progress of a stage.
    pub observer: Observer<'a>,
    /// Receives a line at the beginning of each stage.
    pub stage: &'a mut dyn FnMut(&str),
}

/// A tuned model, or a point before it, with its measures.
struct Try {
    name: String,
    tuned: usize,
    alpha: f64,
    found: Evaluation,
}

impl<B: Backend> SecureRun<'_, B> {
    /// Checks that memory and disk have room for the run.
    ///
    /// # Errors
    /// [`Error::Memory`] says which has not.
    pub fn check_room(&self, plan: &SecurePlan) -> Result<()> {
        if let Some(free) = self.backend.free_memory()
            && plan.memory_bytes > free.bytes
        {
            let help = format!("{} is the bound; `swat plan` says what would make it fit", free.bound);
            let what = format!("tuning on {}", self.backend.name());
            return Err(Error::Memory { what, planned_bytes: plan.memory_bytes, free_bytes: free.bytes, help });
        }
        let parent = self.job.work.parent().filter(|parent| parent.exists()).unwrap_or(Path::new("."));
        match fs4::available_space(parent) {
            Ok(free_bytes) if free_bytes < plan.disk_bytes => {
                let what = format!("{}: the working folder on disk", self.job.work.display());
                let help = "free some disk space, take another --work, or fewer recipes".into();
                Err(Error::Memory { what, planned_bytes: plan.disk_bytes, free_bytes, help })
            }
            _ => Ok(()),
        }
    }

    /// Runs the stages that are not kept.
    ///
    /// # Errors
    /// [`Error::InUse`] where another process runs it; [`Error::Exists`] where the output exists and must not be replaced;
    /// errors of the stages.
    pub fn run(mut self, plan: &SecurePlan, report: &mut Report<'_>) -> Result<Secured> {
        let output = OutputDir::create(&self.job.out, IfExists::from_force(self.job.force))?;
        claim_folder(&self.job.work, &["replay.jsonl", MERGED])?;
        let _lock = lock(&self.job.work)?;
        clock(&self.job.work, Some(self.clock))?;
        let (stages, mut time) = (self.stages(), Clocked::new(plan));
        // Of the model as it was named: a merged one has no card.
        let license = license_of(&self.job.model);
        let adapter = self.job.adapter.take();
        if let Some(adapter) = &adapter {
            begin(&mut time, report, "merge the adapter into the model");
            time.end(self.merge_adapter(&stages, adapter, report.observer)?);
        }
        let model_hash = self.text.files.hash()?.to_owned();
        let (mut refused, mut screened) = (None, None);
        if self.screens() {
            begin(&mut time, report, "screen the data");
            let (found, origin) = self.refused(&stages, &model_hash, report.observer)?;
            time.end(origin);
            // More than half is refused before anything is measured.
            found.leave_out(self.data.train.clone().into())?;
            screened = Some(found.counts(self.data.conversations()));
            self.data.leave_out_of_heldout(&found);
            refused = Some(found);
        }
        let given = json!({ "model": model_hash });
        let mut base = Vec::new();
        let parts = [("choice", "selection", &self.data.valid), ("verdict", "verdict", &self.data.test)];
        for (part, prompts, asked) in parts {
            begin(&mut time, report, &format!("measure the original model, {prompts} prompts"));
            let first_tokens = base.first().and_then(|found: &Evaluation| found.outcomes.first_tokens.as_ref());
            let subject = Subject { name: format!("{part}/given"), model: given.clone(), asked, first_tokens };
            let (found, origin) = self.measure(&stages, &subject, report.observer, || self.given())?;
            time.end(origin);
            base.push(found);
        }
        let [base, base_test] = <[Evaluation; 2]>::try_from(base).map_err(|_| missing())?;
        let mut replayed = None;
        if self.replays() {
            begin(&mut time, report, "own answers, to be replayed");
            let (found, origin) = self.replayed(&stages, &model_hash, report.observer)?;
            time.end(origin);
            replayed = Some(found);
        }
        self.release();

        let (limits, choice) = (&self.job.limits, &self.job.limits.for_choice());
        let (mut tuned, mut tries): (Vec<Tuned>, Vec<Try>) = (Vec::new(), Vec::new());
        let within = |tried: &Try, limits| excess(&base, &tried.found, limits) <= 0.0;
        for tuning in &self.tunings {
            if tries.last().is_some_and(|last| within(last, choice)) {
                break;
            }
            begin(&mut time, report, &format!("tune {}", tuning.name));
            let made_of = (model_hash.as_str(), replayed.as_ref(), refused.as_ref());
            let (made, origin) = self.tuned(&stages, tuning, made_of, report.observer)?;
            time.end(origin);
            begin(&mut time, report, &format!("measure {}", tuning.name));
            tuned.push(made);
            let attempt = (tuning.name.as_str(), tuning.stem.as_str(), tuned.len() - 1, tuning.alpha);
            let (found, origin) = self.attempt(&stages, &tuned, attempt, &base, report.observer)?;
            time.end(origin);
            tries.push(found);
        }
        time.skip(2 * (self.tunings.len() - tuned.len()));
        // Interpolation gives up some of the task: no remedy for exceeding half of a limit, or for what may be chance.
        if tries.iter().any(|tried| within(tried, limits) || passes(&base, tried, limits)) {
            time.skip(1);
        } else {
            begin(&mut time, report, "measure points of the path towards the original model");
            let best = pick(&base, &tries, limits).ok_or_else(missing)?;
            let (index, whole) = (tries[best].tuned, tries[best].alpha);
            let tuning = &self.tunings[index];
            let mut made = Origin::Kept;
            for alpha in POINTS.map(|point| point * whole) {
                let attempt = (tuning.name.as_str(), tuning.stem.as_str(), index, alpha);
                let (found, origin) = self.attempt(&stages, &tuned, attempt, &base, report.observer)?;
                made = if origin == Origin::Made { origin } else { made };
                let ended = within(&found, limits);
                tries.push(found);
                if ended {
                    break;
                }
            }
            time.end(made);
        }
        let chosen = pick(&base, &tries, limits).ok_or_else(missing)?;

        begin(&mut time, report, "write the model");
        let Try { name, tuned: index, alpha, .. } = &tries[chosen];
        let options = MergeOptions {
            by: MergeMethod::Path,
            alpha: Alpha::At(*alpha),
            tau: 0.0,
            save_dtype: self.job.save_dtype,
            max_shard_bytes: self.job.max_shard_bytes,
            points: Vec::new(),
        };
        merge_into(&self.path(&tuned[*index].dir), &options, output.dir(), report.observer)?;
        let hash = ModelDir::open(output.dir())?.hash()?.to_owned();
        time.end(Origin::Made);
        begin(&mut time, report, "measure the tuned model, verdict prompts");
        let subject = Subject {
            name: "verdict/tuned".into(),
            model: json!({ "model": hash }),
            asked: &self.data.test,
            first_tokens: base_test.outcomes.first_tokens.as_ref(),
        };
        let (found, origin) =
            self.measure(&stages, &subject, report.observer, || self.load(output.dir()).map(Rc::new))?;
        time.end(origin);

        let check = Check::new((&self.job.model, &base_test), (&self.job.out, &found), *limits);
        let tried = |(i, attempt): (usize, &Try)| Tried {
            recipe: attempt.name.clone(),
            alpha: attempt.alpha,
            excess: excess(&base, &attempt.found, choice),
            chosen: i == chosen,
            measures: SecureMeasures::of(&attempt.found),
        };
        let as_given = Tried {
            recipe: "given".into(),
            alpha: 0.0,
            excess: 0.0,
            chosen: false,
            measures: SecureMeasures::of(&base),
        };
        let setting = |name: &str, recipe: Option<&String>, alpha, found| SecureSetting {
            name: name.into(),
            recipe: recipe.cloned(),
            alpha,
            seeds: if recipe.is_some() { vec![self.job.seed] } else { Vec::new() },
            measures: SecureMeasures::of(found),
        };
        let tried: Vec<Tried> = std::iter::once(as_given).chain(tries.iter().enumerate().map(tried)).collect();
        let replay = replayed.map(|replayed| replayed.summary);
        let not_held = NotHeld {
            verdict: &check.verdict,
            recipes: &self.job.recipes,
            tried: &tried,
            replay,
            screened,
            valid_prompts: self.data.sizes.valid_prompts,
        };
        let advice = if check.verdict.held { Vec::new() } else { not_held.advice() };
        let outcome = SecureOutcome {
            format: "swat.secure/1",
            settings: vec![setting("given", None, 0.0, &base_test), setting(name, Some(name), *alpha, &found)],
            recommended: check.verdict.held.then(|| name.clone()),
            limits: *limits,
            verdict: check.verdict.clone(),
            tried,
            advice,
            replay,
            screened,
            data: self.data.sizes,
            base: BaseModel {
                name: self.job.model_name.clone(),
                adapter: adapter.map(|adapter| adapter.display().to_string()),
                hash: model_hash,
                license,
            },
            seed: self.job.seed,
            files: self.hashes()?,
            swat: env!("CARGO_PKG_VERSION").into(),
            command: self.job.command.clone(),
        };
        if let Some(refused) = &refused {
            // Not beside the model, which people share.
            write_screened(&self.job.work.join(SCREENED_FILE), &self.screened_lines(refused)?)?;
        }
        json::write(&output.dir().join("outcome.json"), &outcome)?;
        Ok(Secured { outcome, check, output, times: time.times() })
    }

    /// Takes the model with its adapter, merged in the working folder, in the place of the model.
    fn merge_adapter(&mut self, stages: &Stages, adapter: &Path, observer: Observer<'_>) -> Result<Origin> {
        let dir = self.job.work.join(MERGED);
        let inputs = json!({ "model": self.text.files.hash()? });
        let hash = || -> Result<String> { Ok(ModelDir::open(&dir)?.hash()?.to_owned()) };
        let mut origin = Origin::Kept;
        let there = |kept: &String| hash().is_ok_and(|hash| hash == *kept);
        stages.run_unless(MERGED, &inputs, there, || {
            origin = Origin::Made;
            let tuned = adapter.to_owned();
            let models = MergeModels { base: self.job.model.clone(), tuned, ..MergeModels::default() };
            let options = MergeOptions {
                by: MergeMethod::Path,
                alpha: Alpha::At(1.0),
                tau: 0.0,
                save_dtype: StoredAs::AsStored,
                max_shard_bytes: self.job.max_shard_bytes,
                points: Vec::new(),
            };
            merge(&models, &options, &dir, IfExists::Replace, observer)?;
            hash()
        })?;
        self.job.model = dir;
        self.text = self.text_of(&self.job.model)?;
        Ok(origin)
    }

    /// Measures a tuned model, or a point before it, on the selection prompts.
    fn attempt(
        &self,
        stages: &Stages,
        tuned: &[Tuned],
        (name, stem, index, alpha): (&str, &str, usize, f64),
        base: &Evaluation,
        observer: Observer<'_>,
    ) -> Result<(Try, Origin)> {
        let Tuned { dir, inputs } = &tuned[index];
        let subject = Subject {
            name: if alpha < 1.0 { format!("choice/{stem}-{alpha}") } else { format!("choice/{stem}") },
            model: json!({ "tuned": inputs, "alpha": alpha }),
            asked: &self.data.valid,
            first_tokens: base.outcomes.first_tokens.as_ref(),
        };
        let (found, origin) = self.measure(stages, &subject, observer, || self.point(dir, alpha).map(Rc::new))?;
        Ok((Try { name: name.into(), tuned: index, alpha, found }, origin))
    }

    /// Hashes of the files that were read.
    fn hashes(&self) -> Result<BTreeMap<String, String>> {
        let files = self
            .job
            .inputs()
            .into_iter()
            .filter(|(option, _)| !["--model", "--adapter", "--judge-model"].contains(option));
        files.map(|(option, path)| Ok((format!("{option} {}", path.display()), file_hash(path)?))).collect()
    }
}

/// Whether a candidate would pass the gates of the verdict, which account for the interval.
fn passes(base: &Evaluation, tried: &Try, limits: &Limits) -> bool {
    Verdict::new(base, &tried.found, limits).held
}

/// Index of the chosen try: by half of each limit, among those within the limits, else those that pass the gates, else all.
fn pick(base: &Evaluation, tries: &[Try], limits: &Limits) -> Option<usize> {
    let all = || 0..tries.len();
    let mut among: Vec<usize> = all().filter(|index| excess(base, &tries[*index].found, limits) <= 0.0).collect();
    if among.is_empty() {
        among = all().filter(|index| passes(base, &tries[*index], limits)).collect();
    }
    if among.is_empty() {
        among = all().collect();
    }
    let candidate = |index: &usize| Candidate { alpha: tries[*index].alpha, evaluation: &tries[*index].found };
    let candidates: Vec<Candidate<'_>> = among.iter().map(candidate).collect();
    choose(base, &candidates, &limits.for_choice()).map(|choice| among[choice.index])
}

fn missing() -> Error {
    Error::failed("no recipe was tried", "at least one --recipe")
}

fn begin(time: &mut Clocked, report: &mut Report<'_>, name: &str) {
    let (stage, count, left) = time.begin(name);
    let left = if left < 90.0 { format!("{left:.0} s") } else { format!("{:.0} min", left / 60.0) };
    (report.stage)(&format!("stage {stage} of {count}: {name}; about {left} left in all"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secure::eval::Rate;

    /// Attack successes and refused benign prompts, of 1000 each.
    fn measured(attacks: usize, refused: usize) -> Evaluation {
        let rate = |hits| Some(Rate::new(hits, 1000));
        Evaluation { asr: rate(attacks), over_refusal: rate(refused), ..Evaluation::default() }
    }

    #[test]
    fn what_is_within_the_limits_comes_before_what_is_nearer_to_half_of_them() {
        let base = measured(0, 0);
        let chosen = |found: &[(usize, usize)]| {
            let found = found.iter().map(|(attacks, refused)| measured(*attacks, *refused));
            let tries: Vec<Try> = found.map(|found| Try { name: String::new(), tuned: 0, alpha: 1.0, found }).collect();
            pick(&base, &tries, &Limits::default())
        };
        // Limits of 2 and 5 points. The first is within both, and 0.9 + 2.4 = 3.3 points beyond the halves; the second is
        // beyond 2, and 1.5 points beyond its half.
        assert_eq!(chosen(&[(19, 49), (25, 0)]), Some(0));
        assert_eq!(chosen(&[(25, 0), (19, 49), (19, 30)]), Some(2), "1.4 points beyond the halves");
        // Beyond the limits: 2.5 points may be chance, 3.5 are not, although they are nearer to the halves.
        assert_eq!(chosen(&[(25, 60), (35, 0)]), Some(0));
        // Neither is chance: 4 + 0 points beyond the halves before 3 + 6.
        assert_eq!(chosen(&[(40, 85), (50, 0)]), Some(1));
        assert_eq!(chosen(&[]), None);
    }
}
