//! The tuning runs of a study: data, training, and merges after it.

use super::{Run, Study};
use crate::backend::{Backend, Roofline};
use crate::data::{Example, Mixture, Pool, SecurityPrompt, Split};
use crate::error::{Error, FileOp, Result};
use crate::io::{IfExists, write_atomic};
use crate::model::{ChatFiles, ModelDir, StoredAs};
use crate::progress::{Observer, Progress};
use crate::secure::merge::{MergeModels, merge};
use crate::secure::output::TuneOutput;
use crate::secure::overlap::Passage;
use crate::secure::probe::Probe;
use crate::secure::recipe::{Mix, Recipe, mixed};
use crate::secure::replay::{ReplayOptions, ReplaySummary, without_held_out};
use crate::secure::save::SaveAs;
use crate::secure::screen::{RefusedExamples, SCREENED_FILE, write_screened};
use crate::secure::study::config::MergeFiles;
use crate::secure::study::folder::REPLAY_FILE;
use crate::secure::study::outcome::{ScreenedFile, TunedOutcome};
use crate::secure::study::record::{DriftRecorder, losses};
use crate::secure::study::stage::{file_hash, hash};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

impl<B: Backend> Study<'_, B> {
    /// Kind, share and file of what a setting mixes in.
    fn mixes(&self, spec: &Recipe, observer: Observer<'_>) -> Result<Vec<(Mix, f64, PathBuf)>> {
        let missing = |name: &str| Error::input(format!("data.{name}"), "nothing", format!("a file, for {spec}"));
        let mut found = Vec::new();
        for mix in &spec.options.mixes {
            let path = match (mix.what, self.config.data.mixed(mix.what)) {
                (_, Some(path)) => path.to_owned(),
                (Mix::Replay, None) => self.replay(observer)?,
                (what, None) => return Err(missing(what.name())),
            };
            found.push((mix.what, mix.share.unwrap_or(self.config.evaluate.mix_share), path));
        }
        Ok(found)
    }

    /// The model's own answers to the train split of the security file, as `swat replay` makes them, without prompts that
    /// resemble a prompt or task of the evaluation or a held-out conversation.
    fn replay(&self, observer: Observer<'_>) -> Result<PathBuf> {
        let config = self.config;
        let path = config.out.join(REPLAY_FILE);
        let asked = self.data.evaluation.iter().map(|prompt| &prompt.prompt);
        let mut held_out: Vec<String> = asked.chain(self.data.tasks.iter().map(|task| &task.prompt)).cloned().collect();
        if let Some(path) = &config.data.heldout {
            let passages = Passage::of_conversations(path, &mut self.rows.borrow_mut())?;
            held_out.extend(passages.into_iter().map(|passage| passage.text));
        }
        let prompts = without_held_out(&self.data.security, &held_out);
        let texts: Vec<_> = prompts.iter().map(|prompt| (&prompt.prompt, prompt.label, prompt.split)).collect();
        let mut inputs = json!({ "model": self.model_hash, "prompts": hash(&json!(texts)), "seed": config.seed,
            "options": config.replay, "refusals": format!("{:?}", self.refusals) });
        self.add_row_options(&mut inputs);
        let make = || -> Result<(String, ReplaySummary)> {
            let options = ReplayOptions { seed: config.seed, ..config.replay.clone() };
            let (lines, summary) = self.model(&config.model)?.replay(&prompts, &options, self.refusals, observer)?;
            write_atomic(&path, lines.as_bytes())?;
            Ok((file_hash(&path)?, summary))
        };
        let (kept, _) = self.stages.run("replay", &inputs, make)?;
        if file_hash(&path)? != kept {
            return Err(Error::input(
                path.display().to_string(),
                "answers that are not those this study made",
                "remove stages/replay.json to make them again",
            ));
        }
        Ok(path)
    }

    /// Which examples of a file answer what the original model refuses: one stage for each file, whatever the setting.
    fn refused(&self, path: &Path, observer: Observer<'_>) -> Result<RefusedExamples> {
        let (config, file) = (self.config, file_hash(path)?);
        let max_length = config.tune.recipe.shared.max_length;
        let mut inputs = json!({ "model": self.model_hash, "data": file, "max_length": max_length,
            "refusals": format!("{:?}", self.refusals) });
        self.add_row_options(&mut inputs);
        self.stages.run(&format!("screen/{}", &file[..8]), &inputs, || {
            let model = self.model(&config.model)?;
            let examples = model.text.examples(path, max_length, &mut self.rows.borrow_mut())?.examples;
            model.refused_examples(&examples, self.refusals, observer)
        })
    }

    /// Which examples of a setting's data are left out, the attack's among them.
    fn screened(&self, attack: Option<&Path>, observer: Observer<'_>) -> Result<RefusedExamples> {
        let files = self.config.data.train.iter().map(PathBuf::as_path).chain(attack);
        files.map(|path| self.refused(path, observer)).collect()
    }

    /// Counts of each file that the settings screen, and a file of the rows that are left out.
    pub(super) fn screened_files(&self, observer: Observer<'_>) -> Result<Vec<ScreenedFile>> {
        let config = self.config;
        let screens = |spec: &&Recipe| !spec.is_given() && (config.tune.recipe.screen || spec.options.screen);
        let screened: Vec<&Recipe> = config.settings.iter().filter(screens).collect();
        if screened.is_empty() {
            return Ok(Vec::new());
        }
        let attacked = screened.iter().any(|spec| spec.options.share_of(Mix::Attack).is_some());
        let attack = config.data.attack.as_ref().filter(|_| attacked);
        let (mut files, mut lines) = (Vec::new(), String::new());
        let text = self.text(&config.model)?;
        let max_length = config.tune.recipe.shared.max_length;
        for path in config.data.train.iter().chain(attack) {
            let refused = self.refused(path, observer)?;
            let rows = &mut self.rows.borrow_mut();
            let counts = refused.counts(&text.examples(path, max_length, rows)?.examples);
            lines += &refused.lines(path, &text, max_length, rows)?;
            files.push(ScreenedFile { file: path.display().to_string(), counts });
        }
        write_screened(&config.out.join(SCREENED_FILE), &lines)?;
        Ok(files)
    }

    /// A tuning run, and what follows it in the setting's recipe; with the inputs of all.
    pub(super) fn tuned(&self, run: &Run<'_>, probe: &Probe, observer: Observer<'_>) -> Result<(TunedOutcome, Value)> {
        let (tuned, inputs) = self.trained(run, probe, observer)?;
        let Some(step) = run.spec.options.merge else { return Ok((tuned, inputs)) };
        let config = self.config;
        let MergeFiles { aligned, unaligned, safe } = config.merge.clone();
        let others = [&aligned, &unaligned, &safe].into_iter().flatten();
        let others = others.map(|dir| Ok(ModelDir::open(dir)?.hash()?.to_owned())).collect::<Result<Vec<String>>>()?;
        let inputs = json!({ "tuned": inputs, "merge": step.to_string(), "others": others });
        let dir = config.out.join("tuned").join(format!("{}-{}", run.stem, &hash(&inputs)[..8]));
        self.stages.run(&format!("merge/{}", run.stem), &inputs, || {
            let models = MergeModels { base: config.model.clone(), tuned: tuned.dir.clone(), aligned, unaligned, safe };
            let mut report = |p: Progress<'_>| observer(Progress { task: &format!("merge {}", run.name), ..p });
            merge(&models, &step.options(), &dir, IfExists::Replace, &mut report).map(drop)
        })?;
        Ok((TunedOutcome { dir, ..tuned }, inputs))
    }

    fn trained(&self, run: &Run<'_>, probe: &Probe, observer: Observer<'_>) -> Result<(TunedOutcome, Value)> {
        let (config, job, shared) = (self.config, &run.job, &run.job.recipe.shared);
        let train = config.data.train.iter().map(|p| file_hash(p)).collect::<Result<Vec<_>>>()?;
        let extra = self.mixes(run.spec, observer)?;
        let hashes = extra.iter().map(|(.., path)| file_hash(path)).collect::<Result<Vec<_>>>()?;
        let share = extra.first().map_or(config.evaluate.mix_share, |(_, share, _)| *share);
        let mut inputs = json!({ "model": self.model_hash, "probe": probe.hash()?, "job": job, "train": train,
            "mix": hashes.first(), "mix_share": share });
        if extra.len() > 1 {
            inputs["more_mixes"] =
                extra.iter().zip(&hashes).skip(1).map(|((_, share, _), hash)| json!([hash, share])).collect();
        }
        if !extra.is_empty() {
            // Earlier versions took the same examples in every epoch.
            inputs["mixed_in"] = extra.iter().map(|(what, ..)| what.name()).collect();
        }
        self.add_row_options(&mut inputs);
        let mut refused = None;
        if job.recipe.screen {
            let attack = extra.iter().find(|(what, ..)| *what == Mix::Attack);
            let found = self.screened(attack.map(|(.., path)| path.as_path()), observer)?;
            inputs["screened"] = found.hash().into();
            refused = Some(found);
        }
        let folder = config.out.join("tuned");
        let file = format!("{}-{}", run.tuned_stem, &hash(&inputs)[..8]);
        let dir = folder.join(&file);
        let name = format!("tune/{}", run.tuned_stem);
        let tuned = self.stages.run(&name, &inputs, || {
            std::fs::create_dir_all(&folder).map_err(Error::io(&folder, FileOp::Create))?;
            let mut text = self.text(&config.model)?;
            let output = TuneOutput {
                path: dir.clone(),
                force: true,
                resume: true,
                max_shard_bytes: 4 << 30,
                save_dtype: StoredAs::AsStored,
                clock: text.set_clock(self.clock),
                save: SaveAs::Merged,
                base: None,
                roofline: None,
                chat: ChatFiles::default(),
                config: json!({ "study": config, "setting": run.spec }),
            };
            let mut inputs: Vec<(&str, &Path)> = vec![("model", &config.model)];
            inputs.extend(config.data.train.iter().map(|path| ("data.train", path.as_path())));
            let output = output.open(&inputs)?;
            let max_length = shared.max_length;
            let mut examples: Vec<Example> = Vec::new();
            let rows = &mut self.rows.borrow_mut();
            for path in &config.data.train {
                examples.extend(text.examples(path, max_length, rows)?.examples);
            }
            let mut more = Vec::new();
            for (what, share, path) in &extra {
                let mut examples = text.examples(path, max_length, rows)?.examples;
                examples.iter_mut().for_each(|example| example.replayed = *what == Mix::Replay);
                more.push((*what, *share, examples));
            }
            let mut screened = None;
            let examples = mixed(examples, more, shared.seed, |own| {
                let Some(refused) = &refused else { return Ok(own) };
                let (kept, counts) = refused.leave_out(own).map_err(|e| e.at(&run.spec.place()))?;
                screened = Some(counts);
                Ok(kept)
            })?;
            let task_share = task_share(&examples);
            let batches = shared.load(examples.clone())?.batches_per_epoch();
            let steps_per_epoch = batches.div_ceil(shared.grad_accum as u64);
            let watched: Vec<&SecurityPrompt> = self.data.security.iter().filter(|p| p.split == Split::Test).collect();
            let mut callbacks = DriftRecorder {
                probe,
                tokens: text.render_prompts(watched.iter().map(|p| p.prompt.as_str()))?,
                harmful: watched.iter().map(|p| p.is_harmful()).collect(),
                points: Vec::new(),
                path: folder.join(format!("{file}.drift.json")),
                observer: &mut *observer,
                name: run.name.clone(),
            };
            let prepared =
                output.prepare(&text.files, examples, job.clone(), None, self.backend)?.chat(text.chat_files());
            // Before the model is loaded, so that its buffers do not raise the run's peak memory.
            let prepared = prepared.roofline(*self.roofline.get_or_init(|| Roofline::measure_if_free(self.backend)));
            let mut model = text.load(self.backend.clone())?;
            callbacks.begin(&model.decoder)?;
            let summary = prepared.run(&model.text, &mut model.decoder, &mut callbacks)?;
            let losses = losses(&dir.join("metrics.jsonl"))?;
            Ok(TunedOutcome {
                dir: dir.clone(),
                seed: shared.seed,
                steps_per_epoch,
                phases: summary.phases,
                updates: summary.updates,
                points: callbacks.points,
                losses,
                peak_bytes: summary.peak_bytes,
                task_share,
                screened,
            })
        })?;
        Ok((tuned, inputs))
    }
}

/// Share of the examples that nothing was mixed into among the tokens with a loss of an epoch; `None` without such tokens.
fn task_share(mixture: &Mixture<Example>) -> Option<f64> {
    let tokens = |examples: &[Example]| -> f64 {
        examples.iter().map(|example| example.trained.iter().filter(|trained| **trained).count() as f64).sum()
    };
    let own = tokens(&mixture.examples()[..mixture.base()]);
    let part = |pool: &Pool| {
        let examples = &mixture.examples()[pool.examples.clone()];
        tokens(examples) * pool.per_epoch as f64 / examples.len().max(1) as f64
    };
    let all = own + mixture.pools().iter().map(part).sum::<f64>();
    (all > 0.0).then(|| own / all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Redraw;

    #[test]
    fn the_share_of_the_task_by_hand() {
        let example = |trained: usize| Example {
            tokens: vec![1; 4],
            trained: (0..4).map(|i| i < trained).collect(),
            replayed: false,
        };
        let mut mixture = Mixture::from(vec![example(3), example(1), example(2)]);
        assert_eq!(task_share(&mixture), Some(1.0));
        // A quarter of four examples is one of the two, of 1 and 4 tokens: 2.5 on average beside 6.
        mixture.mix_in(vec![example(1), example(4)], 0.25, Redraw::EveryEpoch, 0).unwrap();
        assert_eq!(task_share(&mixture), Some(6.0 / 8.5));
        assert_eq!(task_share(&Mixture::from(vec![example(0)])), None);
    }
}
