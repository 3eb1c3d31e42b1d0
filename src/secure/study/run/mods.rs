//! Probe, robustness map and Mods_Rob of a study.

use super::Study;
use crate::backend::Backend;
use crate::data::Loader;
use crate::error::{Error, Result};
use crate::model::ModelDir;
use crate::modules::ModuleSet;
use crate::progress::Observer;
use crate::secure::loaded::{LoadedModel, REFUSAL_TOKENS};
use crate::secure::probe::Probe;
use crate::secure::robustness::map::RobustnessMap;
use crate::secure::robustness::mods::ModsRob;
use crate::secure::robustness::scorer::PerturbationScorer;
use crate::secure::robustness::search::search;
use crate::secure::robustness::step::{PlannedStep, StepOptions};
use crate::secure::robustness::{By, RobustnessOptions, robustness};
use crate::secure::study::stage::{file_hash, hash};
use crate::secure::tune::TuneRecipe;
use serde_json::json;

/// Robustness map, search and Mods_Rob.
pub(super) struct Mods {
    pub(super) map: RobustnessMap,
    /// None where the configuration names the set.
    pub(super) search: Option<ModsRob>,
    pub(super) set: ModuleSet,
}

impl<B: Backend> Study<'_, B> {
    pub(super) fn probe(&self, observer: Observer<'_>) -> Result<Probe> {
        let config = self.config;
        let path = config.out.join("probe.safetensors");
        let mut inputs = json!({ "model": self.model_hash, "security": file_hash(&config.data.security)?,
            "seed": config.seed, "options": config.probe, "refusals": format!("{:?}", self.refusals) });
        self.add_row_options(&mut inputs);
        let train = || -> Result<String> {
            let model = self.model(&config.model)?;
            let probe =
                model.train_probe(&self.data.security, &config.probe, REFUSAL_TOKENS, self.refusals, observer)?;
            probe.save(&path)?;
            file_hash(&path)
        };
        let kept = self.stages.run("probe", &inputs, train)?;
        if file_hash(&path)? != kept {
            return Err(Error::input(
                path.display().to_string(),
                "a probe that is not the one this study trained",
                "remove stages/probe.json to train it again",
            ));
        }
        Probe::load(&path)
    }

    /// Map and search, or the set that the configuration names.
    pub(super) fn mods(&self, by: By, probe: &Probe, observer: Observer<'_>) -> Result<Mods> {
        let config = self.config;
        // The names of files and stages are those of the configuration's own way without an addition.
        let named = |name: &str| match by == config.robustness.by {
            true => name.to_owned(),
            false => format!("{name}-{}", by.name()),
        };
        let options = RobustnessOptions { by, ..config.robustness.clone() };
        let mut inputs = json!({ "probe": probe.hash()?, "perturb": config.perturb, "robustness": options });
        if by != By::Noise {
            inputs["train"] = config.data.train.iter().map(|path| file_hash(path)).collect::<Result<_>>()?;
            inputs["tune"] = json!([config.tune.recipe.mods_phase, config.tune.recipe.shared, config.seed]);
            self.add_row_options(&mut inputs);
        }
        let path = config.out.join(format!("{}.json", named("map")));
        let map: RobustnessMap = self.stages.run(&named("robustness"), &inputs, || {
            let model = self.model(&config.model)?;
            let asked = (probe, self.data.security.as_slice());
            if by == By::Conflict {
                let step = self.planned_step(&model, observer)?;
                let options = (config.perturb.clone(), &options);
                return model.conflict_map(asked, options, (&step, None), Some(&path), observer);
            }
            let scorer = self.scorer(by, &model, probe, observer)?;
            robustness(&scorer, &options, Some(&path), observer)
        })?;
        let model = ModelDir::open(&config.model)?;
        if let Some(named) = &config.mods {
            let set = named.resolve(&model.config, None, Some(&self.model_hash))?;
            return Ok(Mods { map, search: None, set });
        }
        inputs["search"] = json!(config.search);
        inputs["map"] = json!(map.hash()?);
        let found: ModsRob = self.stages.run(&named("search"), &inputs, || {
            let found = if by == By::Conflict {
                search(&map, &config.search, &mut |set, _| map.first_order(set), observer)?
            } else {
                let model = self.model(&config.model)?;
                let scorer = self.scorer(by, &model, probe, observer)?;
                let score = config.search.score;
                let mut joint = |set: &ModuleSet, seeds: &[u64]| scorer.joint(set, score, map.epsilon, seeds);
                search(&map, &config.search, &mut joint, observer)?
            };
            found.save(&config.out.join(format!("{}.json", named("mods"))))?;
            Ok(found)
        })?;
        let set = found.modules(&model.config.cells())?;
        Ok(Mods { map, search: Some(found), set })
    }

    /// The scorer of a map that is made in this way.
    fn scorer<'m>(
        &'m self,
        by: By,
        model: &'m LoadedModel<B>,
        probe: &'m Probe,
        observer: Observer<'_>,
    ) -> Result<PerturbationScorer<'m, B>> {
        let (prompts, options) = (&self.data.security, self.config.perturb.clone());
        if by == By::Noise {
            return model.scorer(probe, prompts, options);
        }
        model.step_scorer(probe, prompts, options, self.planned_step(model, observer)?)
    }

    /// The step of the first phase, on the study's training data.
    fn planned_step(&self, model: &LoadedModel<B>, observer: Observer<'_>) -> Result<PlannedStep> {
        let TuneRecipe { shared, mods_phase, .. } = &self.config.tune.recipe;
        let mut examples = Vec::new();
        for path in &self.config.data.train {
            let rows = &mut self.rows.borrow_mut();
            examples.extend(model.text.examples(path, shared.max_length, rows)?.examples);
        }
        let loader = Loader::new(examples.clone(), shared.loader())?;
        let options = StepOptions {
            lr: mods_phase.lr,
            steps: mods_phase.steps_of(&loader, shared)?.max(1),
            batch_size: shared.batch_size,
            max_length: shared.max_length,
            seed: self.config.seed,
            ..StepOptions::default()
        };
        PlannedStep::check_memory(&model.decoder.config, &options, self.backend)?;
        model.planned_step(examples, &options, observer)
    }

    pub(super) fn joint(
        &self,
        set: &ModuleSet,
        probe: &Probe,
        map: &RobustnessMap,
        observer: Observer<'_>,
    ) -> Result<f64> {
        let config = self.config;
        let score = map.score(config.search.score);
        let inputs = json!({ "map": map.hash()?, "set": set.to_string(), "score": score });
        self.stages.run(&format!("joint/{}", hash(&inputs)), &inputs, || {
            if map.by == By::Conflict {
                return map.first_order(set);
            }
            let model = self.model(&config.model)?;
            let scorer = self.scorer(map.by, &model, probe, observer)?;
            scorer.joint(set, score, map.epsilon, &map.seeds)
        })
    }
}
