//! Probe, robustness map and Mods_Rob of a study.

use super::Study;
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::model::ModelDir;
use crate::modules::ModuleSet;
use crate::progress::Observer;
use crate::secure::loaded::REFUSAL_TOKENS;
use crate::secure::probe::Probe;
use crate::secure::robustness::map::RobustnessMap;
use crate::secure::robustness::mods::ModsRob;
use crate::secure::robustness::robustness;
use crate::secure::robustness::search::search;
use crate::secure::study::stage::{file_hash, hash};
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
    pub(super) fn mods(&self, probe: &Probe, observer: Observer<'_>) -> Result<Mods> {
        let config = self.config;
        let mut inputs = json!({ "probe": probe.hash()?, "perturb": config.perturb, "robustness": config.robustness });
        let path = config.out.join("map.json");
        let map: RobustnessMap = self.stages.run("robustness", &inputs, || {
            let model = self.model(&config.model)?;
            let scorer = model.scorer(probe, &self.data.security, config.perturb.clone())?;
            robustness(&scorer, &config.robustness, Some(&path), observer)
        })?;
        let model = ModelDir::open(&config.model)?;
        if let Some(named) = &config.mods {
            let set = named.resolve(&model.config, None, Some(&self.model_hash))?;
            return Ok(Mods { map, search: None, set });
        }
        inputs["search"] = json!(config.search);
        inputs["map"] = json!(map.hash()?);
        let found: ModsRob = self.stages.run("search", &inputs, || {
            let model = self.model(&config.model)?;
            let scorer = model.scorer(probe, &self.data.security, config.perturb.clone())?;
            let score = config.search.score;
            let mut joint = |set: &ModuleSet, seeds: &[u64]| scorer.joint(set, score, map.epsilon, seeds);
            let found = search(&map, &config.search, &mut joint, observer)?;
            found.save(&config.out.join("mods.json"))?;
            Ok(found)
        })?;
        let set = found.modules(&model.config.cells())?;
        Ok(Mods { map, search: Some(found), set })
    }

    pub(super) fn joint(&self, set: &ModuleSet, probe: &Probe, map: &RobustnessMap) -> Result<f64> {
        let config = self.config;
        let inputs = json!({ "map": map.hash()?, "set": set.to_string(), "score": config.search.score });
        self.stages.run(&format!("joint/{}", hash(&inputs)), &inputs, || {
            let model = self.model(&config.model)?;
            let scorer = model.scorer(probe, &self.data.security, config.perturb.clone())?;
            scorer.joint(set, config.search.score, map.epsilon, &map.seeds)
        })
    }
}
