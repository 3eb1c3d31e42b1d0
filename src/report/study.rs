//! A finished study as files: HTML page, Markdown, SVG drawings and JSON.

mod details;
mod findings;
mod map;
mod results;
mod setting;
mod training;

use super::format;
use super::page::{Figure, Footer, Report, Section};
use super::table::{Table, TextStyle, markdown_text};
use crate::error::{Error, Result};
use crate::io::write_atomic;
use crate::secure::study::{Outcome, RunConfig};
pub use map::{perturbation, robustness_map, robustness_table};
use setting::{Setting, if_means, seeds_text, several, training_seeds};
use std::path::Path;
use std::time::Duration;

/// A study with names, colours and values of its settings.
struct Study<'a> {
    outcome: &'a Outcome,
    config: &'a RunConfig,
    settings: Vec<Setting<'a>>,
}

impl<'a> Study<'a> {
    fn new(outcome: &'a Outcome, config: &'a RunConfig) -> Self {
        Self { outcome, config, settings: Setting::all(outcome, config) }
    }
}

/// The page of a study; sections for which it has no data are left out. `command` is the command line that ran it.
pub fn study_report(outcome: &Outcome, config: &RunConfig, command: &str) -> Report {
    let study = Study::new(outcome, config);
    let details = Section { heading: "Details".into(), tables: study.details(), ..Section::default() };
    let sections = [study.results(), study.modules(), study.updates(), study.drift(), study.training(), Some(details)];
    Report {
        title: outcome.title.clone(),
        subtitle: study.subtitle(),
        highlights: results::highlights(&study.settings),
        sections: sections.into_iter().flatten().collect(),
        footer: study.footer(command),
    }
}

/// Writes `report.html`, `results.md` and `outcome.json` into `dir`, with `robustness.svg` and `mods.svg` where the
/// study has a map and a set; each file whole or not at all. `dir` is made if it is not there.
///
/// # Errors
/// [`Error::Io`] where a file cannot be written.
pub fn write_report(outcome: &Outcome, config: &RunConfig, command: &str, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir, "create"))?;
    let study = Study::new(outcome, config);
    let json = serde_json::to_vec_pretty(outcome)
        .map_err(|e| Error::failed(format!("the outcome as JSON: {e}"), "this is a bug; please report it"))?;
    let write = |name: &str, bytes: &[u8]| write_atomic(&dir.join(name), bytes);
    write("outcome.json", &json)?;
    let (score, mods) = (config.search.score, outcome.mods.clone().unwrap_or_default());
    if let Some(map) = map::drawn(outcome, score) {
        write("robustness.svg", robustness_map(map, score, &mods).svg().as_bytes())?;
    }
    if let Some(mods) = &outcome.mods {
        write("mods.svg", map::mods_map(outcome, mods).svg().as_bytes())?;
    }
    write("results.md", study.markdown().as_bytes())?;
    write("report.html", study_report(outcome, config, command).html()?.as_bytes())
}

/// The table of results for a terminal.
pub fn results_text(outcome: &Outcome, config: &RunConfig) -> String {
    results::results_table(&Setting::all(outcome, config), config).text(TextStyle::Unicode)
}

impl Study<'_> {
    fn results_table(&self) -> Option<Table> {
        (!self.settings.is_empty()).then(|| results::results_table(&self.settings, self.config))
    }

    fn map_tables(&self) -> Option<[Table; 2]> {
        let score = self.config.search.score;
        let mods = self.outcome.mods.clone().unwrap_or_default();
        let map = map::drawn(self.outcome, score)?;
        Some([robustness_table(map, score, &mods), map::layers_table(map, score, &mods)])
    }

    fn details(&self) -> Vec<Table> {
        details::details(&self.settings, self.outcome, self.config)
    }

    fn markdown(&self) -> String {
        let paragraph = |text: &str| format!("{}\n", markdown_text(text));
        let findings = findings::findings(&self.settings);
        let mut parts = vec![format!("# {}", paragraph(&self.outcome.title)), paragraph(&self.subtitle())];
        parts.extend(findings.split("\n\n").filter(|p| !p.is_empty()).map(paragraph));
        let tables = self.results_table().into_iter().chain(self.map_tables().into_iter().flatten());
        parts.extend(tables.chain(self.details()).map(|table| table.markdown()));
        parts.join("\n")
    }

    fn subtitle(&self) -> String {
        let count = self.settings.len();
        let mut text = format!("{count} {} of one model.", if count == 1 { "setting" } else { "settings" });
        if let Some(mods) = &self.outcome.mods {
            let (all, share) = map::choice(self.outcome, mods);
            let (chosen, all, share) = (mods.len(), all.len(), format::percent(share, 1));
            text.push_str(&format!(" Mods_Rob holds {chosen} of {all} modules, {share} of their parameters."));
        }
        if several(&self.settings) {
            text.push_str(&format!(" Tuned with training {}.", seeds_text(&training_seeds(&self.settings))));
        }
        text
    }

    fn results(&self) -> Option<Section> {
        let table = self.results_table()?;
        let sets = results::sets_chart(&self.settings);
        let results = Figure {
            name: "results".into(),
            svg: results::results_chart(&self.settings).svg(),
            caption: "Attack success should be low, the task score high.".into(),
            wide: sets.is_none(),
        };
        let sets = sets.map(|sets| Figure {
            name: "sets".into(),
            svg: sets.svg(),
            caption: "If noise predicts harm, sets whose joint perturbation costs little end with low attack success."
                .into(),
            wide: false,
        });
        Some(Section {
            heading: "Results".into(),
            text: findings::findings(&self.settings),
            figures: std::iter::once(results).chain(sets).collect(),
            tables: vec![table],
        })
    }

    fn modules(&self) -> Option<Section> {
        let score = self.config.search.score;
        let mods = self.outcome.mods.clone().unwrap_or_default();
        let robustness = map::drawn(self.outcome, score).map(|map| Figure {
            name: "robustness".into(),
            svg: robustness_map(map, score, &mods).svg(),
            caption: "Bright modules are sensitive, dark ones robust. Hover over a cell for its value.".into(),
            wide: false,
        });
        let chosen = self.outcome.mods.as_ref().map(|mods| Figure {
            name: "mods".into(),
            svg: map::mods_map(self.outcome, mods).svg(),
            caption: "Mods_Rob, the set that the warm-up trains alone.".into(),
            wide: false,
        });
        let figures: Vec<Figure> = robustness.into_iter().chain(chosen).collect();
        (!figures.is_empty()).then(|| Section {
            heading: "Module robustness".into(),
            text:
                "Each cell is one module of one layer. Its weights are perturbed by noise of the same relative size, \
                   and the security score is measured again: a large drop means that telling harmful from harmless \
                   prompts depends on this module."
                    .into(),
            figures,
            tables: self.map_tables().into_iter().flatten().collect(),
        })
    }

    fn updates(&self) -> Option<Section> {
        let updates = training::Updates::new(&self.settings, self.outcome)?;
        let means = if_means(&self.settings, " Means over the training seeds.");
        Some(Section {
            heading: "Update magnitudes".into(),
            text: "How far the weights moved, relative to their size: modules of Mods_Rob against the rest, layer by \
                   layer."
                .into(),
            figures: vec![Figure {
                name: "updates".into(),
                svg: updates.chart().svg(),
                caption: format!("Phases together: the root of the sum of their squared updates.{means}"),
                wide: true,
            }],
            tables: vec![updates.table()],
        })
    }

    fn drift(&self) -> Option<Section> {
        let [probe, refusal] = training::drift_charts(&self.settings, self.outcome)?;
        Some(Section {
            heading: "Drift by epoch".into(),
            text: "The probe is frozen: it was trained on the model as given. Where it holds while refusal falls, the \
                   representation survives and the behaviour does not. Epoch 0 is the model as given."
                .into(),
            figures: vec![
                Figure {
                    name: "drift-probe".into(),
                    svg: probe.svg(),
                    caption: "Representation: does the model still tell harmful from harmless?".into(),
                    wide: false,
                },
                Figure {
                    name: "drift-refusal".into(),
                    svg: refusal.svg(),
                    caption: "Behaviour: does it still refuse what is harmful, and only that?".into(),
                    wide: false,
                },
            ],
            tables: Vec::new(),
        })
    }

    fn training(&self) -> Option<Section> {
        let chart = training::loss_chart(&self.settings)?;
        Some(Section {
            heading: "Training".into(),
            figures: vec![Figure {
                name: "loss".into(),
                svg: chart.svg(),
                caption: if_means(&self.settings, "Means over the training seeds.").into(),
                wide: true,
            }],
            ..Section::default()
        })
    }

    fn footer(&self, command: &str) -> Footer {
        let all = |seeds: &[u64]| seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        let noise = self.outcome.map.as_ref().map(|map| map.seeds.as_slice()).unwrap_or_default();
        let seconds = Duration::try_from_secs_f64(self.outcome.seconds).ok();
        let items = [
            ("Seeds, splits and samples", self.config.seed.to_string()),
            ("Seeds, training", all(&training_seeds(&self.settings))),
            ("Seeds, noise", all(noise)),
            ("Wall time", seconds.map(format::duration).unwrap_or_default()),
            ("swat", env!("CARGO_PKG_VERSION").into()),
            ("Model hash", self.outcome.model_hash.clone()),
        ];
        let items = items.into_iter().filter(|(_, value)| !value.is_empty());
        Footer { command: command.to_owned(), items: items.map(|(name, value)| (name.to_owned(), value)).collect() }
    }
}
