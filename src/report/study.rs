//! A finished study as files: HTML page, Markdown, SVG drawings and JSON.

mod details;
mod findings;
mod map;
mod results;
mod setting;
mod training;
mod verdict;

use super::chart::Scatter;
use super::format;
use super::page::{Figure, Footer, Highlight, Report, Section};
use super::table::{Table, markdown_text};
use crate::error::{Error, FileOp, Result};
use crate::io::{json, write_atomic};
use crate::secure::study::{Conclusion, Outcome, RunConfig, ScreenedFile, claims};
use crate::secure::{By, ScoreKind};
pub use map::{perturbation, robustness_map, robustness_table};
use setting::{Setting, if_means, seeds_text, several, training_seeds};
use std::path::Path;
use std::time::Duration;

/// A study's outcome with the names, colours and values of its settings.
struct Study<'a> {
    outcome: &'a Outcome,
    config: &'a RunConfig,
    settings: Vec<Setting<'a>>,
    conclusion: Conclusion,
}

impl<'a> Study<'a> {
    fn new(outcome: &'a Outcome, config: &'a RunConfig) -> Self {
        // Not that of the outcome, which earlier versions did not write.
        let conclusion = Conclusion::new(&outcome.settings, &config.limits);
        Self { outcome, config, settings: Setting::all(outcome, config), conclusion }
    }
}

/// The report page of a study; sections without data are left out. `command` is the command line of the run.
pub fn study_report(outcome: &Outcome, config: &RunConfig, command: &str) -> Report {
    let study = Study::new(outcome, config);
    let details = Section { heading: "Details".into(), tables: study.details(), ..Section::default() };
    let sections = [
        verdict::has_verdict(&study.settings).then(|| verdict::section(&study.settings, &study.conclusion)),
        study.results(),
        study.findings(),
        study.modules(),
        study.updates(),
        study.drift(),
        study.training(),
        Some(details),
    ];
    Report {
        title: outcome.title.clone(),
        subtitle: study.subtitle(),
        highlights: study.highlights(),
        sections: sections.into_iter().flatten().collect(),
        footer: study.footer(command),
    }
}

/// Writes `report.html`, `results.md` and `outcome.json` into `dir`, which is created if missing, and `robustness.svg`
/// and `mods.svg` where the study has a map and a set. Each file is written atomically.
///
/// # Errors
/// [`Error::Io`] where a file cannot be written.
pub fn write_report(outcome: &Outcome, config: &RunConfig, command: &str, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir, FileOp::Create))?;
    let study = Study::new(outcome, config);
    let write = |name: &str, text: &str| write_atomic(&dir.join(name), text.as_bytes());
    json::write(&dir.join("outcome.json"), outcome)?;
    let (score, mods) = (study.score(), outcome.mods.clone().unwrap_or_default());
    if let Some(map) = map::drawn(outcome, score) {
        write("robustness.svg", &robustness_map(map, score, &mods).svg())?;
    }
    if let Some(mods) = &outcome.mods {
        write("mods.svg", &map::mods_map(outcome, mods).svg())?;
    }
    write("results.md", &study.markdown())?;
    write("report.html", &study_report(outcome, config, command).html()?)
}

/// The table of results for a terminal, and the verdict.
pub fn results_text(outcome: &Outcome, config: &RunConfig) -> String {
    let study = Study::new(outcome, config);
    let table = results::results_table(&study.settings, &study.conclusion, config).text();
    match verdict::has_verdict(&study.settings) {
        true => format!("{table}\n{}\n", verdict::line(&study.settings, &study.conclusion)),
        false => table,
    }
}

impl Study<'_> {
    /// The score of the map, its own where it has but one.
    fn score(&self) -> ScoreKind {
        let asked = self.config.search.score;
        self.outcome.map.as_ref().map_or(asked, |map| map.score(asked))
    }

    fn results_table(&self) -> Option<Table> {
        (!self.settings.is_empty()).then(|| results::results_table(&self.settings, &self.conclusion, self.config))
    }

    fn highlights(&self) -> Vec<Highlight> {
        let verdict = verdict::has_verdict(&self.settings).then(|| verdict::tile(&self.settings, &self.conclusion));
        verdict.into_iter().chain(results::highlights(&self.settings, &self.conclusion)).collect()
    }

    fn map_tables(&self) -> Option<[Table; 2]> {
        let score = self.score();
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
        if verdict::has_verdict(&self.settings) {
            let Section { text, tables, .. } = verdict::section(&self.settings, &self.conclusion);
            parts.push(paragraph(&text));
            parts.extend(tables.iter().map(Table::markdown));
        }
        parts.extend(self.results_table().map(|table| table.markdown()));
        parts.extend(findings.split("\n\n").filter(|p| !p.is_empty()).map(paragraph));
        let tables = self.map_tables().into_iter().flatten();
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
        if self.outcome.overlapping_rows > 0 {
            let rows = format::count(self.outcome.overlapping_rows as u64);
            text.push_str(&format!(
                " {rows} rows of the tuning data hold prompts of the evaluation, or near-duplicates."
            ));
        }
        if !self.outcome.screened.is_empty() {
            let file = |ScreenedFile { file, counts }: &ScreenedFile| {
                let counted = [counts.left_out, counts.examples].map(|n| format::count(n as u64));
                let name = Path::new(file).file_name().unwrap_or_default().to_string_lossy();
                format!("{} of {} examples of {name}", counted[0], counted[1])
            };
            let files: Vec<String> = self.outcome.screened.iter().map(file).collect();
            text.push_str(&format!(
                " Screening leaves out what answers questions that the original model refuses: {} (screened.jsonl).",
                files.join(", ")
            ));
        }
        if several(&self.settings) {
            text.push_str(&format!(" Tuned with training {}.", seeds_text(&training_seeds(&self.settings))));
        }
        text
    }

    fn results(&self) -> Option<Section> {
        let table = self.results_table()?;
        let figure = |(name, scatter, caption): (&str, Scatter, &str)| Figure::new(name, scatter.svg(), caption);
        let figures = verdict::fronts(&self.settings, &self.conclusion).into_iter().map(figure).collect();
        Some(Section { heading: "Results".into(), figures, tables: vec![table], ..Section::default() })
    }

    fn findings(&self) -> Option<Section> {
        if self.settings.is_empty() {
            return None;
        }
        let caption = "Attack success should be low, the task score high.";
        let results = Figure::new("results", results::results_chart(&self.settings).svg(), caption);
        let caption =
            "If noise predicts harm, sets with a small joint drop under perturbation end with low attack success.";
        let figures = match results::sets_chart(&self.settings) {
            None => vec![results.wide()],
            Some(sets) => vec![results, Figure::new("sets", sets.svg(), caption)],
        };
        let text = findings::findings(&self.settings);
        let tables = verdict::claims(&self.settings, &claims(&self.outcome.settings));
        Some(Section { heading: "Comparisons".into(), text, figures, tables })
    }

    fn modules(&self) -> Option<Section> {
        let score = self.score();
        let mods = self.outcome.mods.clone().unwrap_or_default();
        let caption = "Bright modules are sensitive, dark ones robust. Hover over a cell for its value.";
        let robustness = map::drawn(self.outcome, score)
            .map(|map| Figure::new("robustness", robustness_map(map, score, &mods).svg(), caption));
        let caption = "Mods_Rob, the set that the warm-up trains alone.";
        let chosen = self.outcome.mods.as_ref().map(|mods| map::mods_map(self.outcome, mods).svg());
        let more = self.outcome.more_maps.iter().map(|more| {
            let drawing = robustness_map(&more.map, more.map.score(self.config.search.score), &more.mods);
            let name = format!("robustness-{}", more.map.by.name());
            Figure::new(&name, drawing.svg(), format!("One cell is one module of one layer. {}", map::how(more.map.by)))
        });
        let chosen = chosen.map(|svg| Figure::new("mods", svg, caption));
        let figures: Vec<Figure> = robustness.into_iter().chain(chosen).chain(more).collect();
        (!figures.is_empty()).then(|| Section {
            heading: "Module robustness".into(),
            text: format!(
                "Each cell is one module of one layer. {} A large drop means that the model's separation of harmful from \
                 benign prompts depends on this module.",
                map::how(self.outcome.map.as_ref().map_or(By::Noise, |map| map.by))
            ),
            figures,
            tables: self.map_tables().into_iter().flatten().collect(),
        })
    }

    fn updates(&self) -> Option<Section> {
        let updates = training::Updates::new(&self.settings, self.outcome)?;
        let means = if_means(&self.settings, " Means over the training seeds.");
        let caption = format!("Both phases together: the root of the sum of their squared updates.{means}");
        Some(Section {
            heading: "Update magnitudes".into(),
            text:
                "How far the weights moved relative to their norm, layer by layer: Mods_Rob against the other modules."
                    .into(),
            figures: vec![Figure::new("updates", updates.chart().svg(), caption).wide()],
            tables: vec![updates.table()],
        })
    }

    fn drift(&self) -> Option<Section> {
        let [probe, refusal] = training::drift_charts(&self.settings, self.outcome)?;
        let representation = "Representation: does the model still separate harmful from benign prompts?";
        let behaviour = "Behaviour: does it still refuse harmful prompts, and only those?";
        Some(Section {
            heading: "Drift by epoch".into(),
            text: "The probe is frozen: it was trained on the original model. Where its gap holds while refusal falls, the \
                   representation survives and the behaviour does not. Epoch 0 is the original model."
                .into(),
            figures: vec![
                Figure::new("drift-probe", probe.svg(), representation),
                Figure::new("drift-refusal", refusal.svg(), behaviour),
            ],
            tables: Vec::new(),
        })
    }

    fn training(&self) -> Option<Section> {
        let svg = training::loss_chart(&self.settings)?.svg();
        let caption = if_means(&self.settings, "Means over the training seeds.");
        let figures = vec![Figure::new("loss", svg, caption).wide()];
        Some(Section { heading: "Training".into(), figures, ..Section::default() })
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
