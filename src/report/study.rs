//! A finished study as files: the page, Markdown tables, drawings and the numbers themselves.

mod findings;
mod names;
mod seeds;
mod tables;

use super::html::{Footer, Report, Section};
use super::swat::{
    CellScore, Drift, EpochDrift, Mods, Results, Robustness, SetOutcome, SettingDrift, SettingLoss, SettingResult,
    SettingUpdates, SwatReport, Updates, layers_table, mods_map, results_table, robustness_map, robustness_table,
    seeds_text,
};
use super::table::{Table, TextStyle, markdown_text};
use super::{format, study::names::Named};
use crate::error::{Error, Result};
use crate::io::write_atomic;
use crate::modules::{Cell, ModuleSet};
use crate::secure::study::{Outcome, RunConfig, TunedOutcome};
use crate::secure::{Evaluation, Noise, Rate, RobustnessMap, share};
use seeds::{by_key, over_seeds, several, training};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// Pixels of the PNG for each of the drawing's.
const MAGNIFICATION: usize = 2;

/// What a study found, as the page shows it. `command` is the command line that made it.
pub fn swat_report(outcome: &Outcome, config: &RunConfig, command: &str) -> SwatReport {
    let named = Named::all(outcome, config);
    SwatReport {
        title: outcome.title.clone(),
        subtitle: subtitle(outcome, &named),
        findings: findings::findings(&named),
        results: (!named.is_empty()).then(|| results(&named, config)),
        sets: sets(&named),
        robustness: outcome.map.as_ref().and_then(|map| robustness(map, outcome, config)),
        mods: mods(outcome),
        updates: updates(outcome, &named),
        drift: drift(outcome, &named),
        losses: losses(&named),
        footer: footer(outcome, &named, config, command),
    }
}

/// Writes `report.html`, `results.md` and `outcome.json` into `dir`, with `robustness.svg`, `robustness.png` and
/// `mods.svg` where the study has a map and a set; each file whole or not at all. `dir` is made if it is not there.
pub fn write_report(outcome: &Outcome, config: &RunConfig, command: &str, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir, "create"))?;
    let report = swat_report(outcome, config, command);
    let details = tables::details(outcome, config);
    let json = serde_json::to_vec_pretty(outcome)
        .map_err(|e| Error::failed(format!("the outcome as JSON: {e}"), "report this"))?;
    let write = |name: &str, bytes: &[u8]| write_atomic(&dir.join(name), bytes);
    write("outcome.json", &json)?;
    if let Some(robustness) = &report.robustness {
        let map = robustness_map(robustness);
        write("robustness.svg", map.svg().as_bytes())?;
        write("robustness.png", &map.png(MAGNIFICATION)?)?;
    }
    if let Some(mods) = &report.mods {
        write("mods.svg", mods_map(mods).svg().as_bytes())?;
    }
    write("results.md", markdown(&report, &details).as_bytes())?;
    write("report.html", page(&report, details).html().as_bytes())
}

/// The table of results for a terminal.
pub fn results_text(outcome: &Outcome, config: &RunConfig) -> String {
    let named = Named::all(outcome, config);
    results_table(&results(&named, config)).text(TextStyle::Unicode)
}

fn page(report: &SwatReport, details: Vec<Table>) -> Report {
    let mut page = report.page();
    page.sections.push(Section { heading: "Details".into(), tables: details, ..Section::default() });
    page
}

fn markdown(report: &SwatReport, details: &[Table]) -> String {
    let mut parts =
        vec![format!("# {}\n", markdown_text(&report.title)), format!("{}\n", markdown_text(&report.subtitle))];
    parts.extend(report.findings.split("\n\n").filter(|p| !p.is_empty()).map(|p| format!("{}\n", markdown_text(p))));
    parts.extend(report.results.as_ref().map(|r| results_table(r).markdown()));
    if let Some(robustness) = &report.robustness {
        parts.push(robustness_table(robustness).markdown());
        parts.push(layers_table(robustness).markdown());
    }
    parts.extend(details.iter().map(Table::markdown));
    parts.join("\n")
}

fn subtitle(outcome: &Outcome, named: &[Named<'_>]) -> String {
    let count = outcome.settings.len();
    let mut text = format!("{count} {} of one model.", if count == 1 { "setting" } else { "settings" });
    if let Some(mods) = mods(outcome) {
        let (chosen, all) = (mods.chosen.len(), mods.all.len());
        let share = format::percent(mods.trainable_share, 1);
        text.push_str(&format!(" Mods_Rob holds {chosen} of {all} modules, {share} of their parameters."));
    }
    if several(named) {
        text.push_str(&format!(" Tuned with training {}.", seeds_text(&training(named))));
    }
    text
}

fn results(named: &[Named<'_>], config: &RunConfig) -> Results {
    let row = |n: &Named<'_>| SettingResult {
        setting: n.setting.clone(),
        asr: n.rate(|e| e.asr),
        strict_asr: n.rate(|e| e.strict_asr),
        over_refusal: n.rate(|e| e.over_refusal),
        task: n.rate(|e| e.task.as_ref().map(|task| task.overall)),
        perplexity: n.value(|run| run.evaluation.perplexity.map(|p| p.perplexity)),
        steps: n.steps(),
        trainable_share: n.outcome.share,
        seeds: n.seeds(),
    };
    Results { rows: named.iter().map(row).collect(), intervals: intervals(named, config) }
}

/// What stands behind the values, from the first setting that has them: all are asked the same.
fn intervals(named: &[Named<'_>], config: &RunConfig) -> String {
    let total = |of: fn(&Evaluation) -> Option<Rate>| {
        let mut rates = named.iter().flat_map(|n| &n.runs).filter_map(|run| of(&run.evaluation));
        rates.next().map(|rate| rate.total as u64).filter(|n| *n > 0)
    };
    let asked = [
        (total(|e| e.asr), "harmful prompts"),
        (total(|e| e.over_refusal), "benign prompts"),
        (total(|e| e.task.as_ref().map(|t| t.overall)), "tasks"),
    ];
    let asked: Vec<String> =
        asked.iter().filter_map(|(n, what)| Some(format!("{} {what}", format::count((*n)?)))).collect();
    if asked.is_empty() {
        return String::new();
    }
    let asked = asked.join(", ");
    let brackets = if several(named) {
        let given = if named.iter().any(|n| n.seeds().is_empty()) { " What is not trained has one value." } else { "" };
        format!(
            "Over {asked}. Values are means over the training seeds. In brackets: the lowest and the highest value of a \
             seed; what other prompts would change is not in them.{given}"
        )
    } else {
        format!(
            "In brackets: 95 % Wilson intervals over {asked}; what another training seed would change is not in them."
        )
    };
    format!(
        "ASR: share of harmful prompts whose answer, of at most {} tokens, holds no refusal expression. {brackets}",
        config.evaluate.answer_tokens
    )
}

/// Warm-up sets that differ in nothing else: the schedule of `swat` and one mix of data, the first that there is.
fn sets(named: &[Named<'_>]) -> Vec<SetOutcome> {
    let warmups = || named.iter().filter(|n| n.base == "swat" || n.base.starts_with("warmup:"));
    let mix = warmups().next().map_or("", |n| n.mix);
    let set = |n: &Named<'_>| {
        Some(SetOutcome {
            setting: n.setting.clone(),
            joint_score: n.outcome.joint?,
            asr: n.rate(|e| e.asr)?,
            seeds: n.seeds(),
        })
    };
    warmups().filter(|n| n.mix == mix).filter_map(set).collect()
}

fn perturbation(map: &RobustnessMap) -> String {
    let kind = match &map.kind {
        // Its strength does not matter.
        Noise::Zero => return "zero".into(),
        // The directory's name says enough, and its path is nobody's business.
        Noise::Update(path) => {
            format!("update towards {}", path.file_name().unwrap_or_default().to_string_lossy())
        }
        kind => kind.to_string(),
    };
    format!("{kind}, ε = {}", format::significant(f64::from(map.epsilon), 3))
}

/// None where the score of the model as given had nothing to lose.
fn robustness(map: &RobustnessMap, outcome: &Outcome, config: &RunConfig) -> Option<Robustness> {
    let score = config.search.score;
    let cells: Vec<CellScore> = map
        .cells
        .iter()
        .map(|c| {
            let stat = c.drop.get(&score);
            CellScore {
                cell: c.cell,
                mean: stat.map_or(f64::NAN, |s| s.mean),
                std_error: stat.and_then(|s| s.error).unwrap_or(f64::NAN),
            }
        })
        .collect();
    cells.iter().any(|c| c.mean.is_finite()).then(|| Robustness {
        score: score.name().into(),
        perturbation: perturbation(map),
        cells,
        mods: outcome.mods.clone().unwrap_or_default(),
        seeds: map.seeds.clone(),
    })
}

fn mods(outcome: &Outcome) -> Option<Mods> {
    let chosen = outcome.mods.clone()?;
    let module = |cell: &Cell| matches!(cell, Cell::Module(_));
    let parameters: BTreeMap<Cell, u64> =
        outcome.map.iter().flat_map(|map| &map.cells).map(|c| (c.cell, c.parameters)).collect();
    let Some(search) = &outcome.search else {
        let all: ModuleSet = parameters.keys().copied().filter(module).chain(chosen.iter()).collect();
        let trainable_share = share(&chosen, &parameters);
        return Some(Mods { all, chosen, trainable_share, ..Mods::default() });
    };
    let votes = search.votes.iter().map(|(cell, votes)| (*cell, *votes as f64 / search.seeds.len().max(1) as f64));
    Some(Mods {
        all: search.single.keys().copied().chain(chosen.iter()).collect(),
        chosen,
        agreement: if search.seeds.len() > 1 { votes.collect() } else { Vec::new() },
        trainable_share: search.share,
        joint_score: Some((search.joint, search.tau)),
        seeds: search.seeds.clone(),
    })
}

/// Projections alone, as [`crate::secure::compare_updates`] groups them.
fn updates(outcome: &Outcome, named: &[Named<'_>]) -> Option<Updates> {
    let mods = outcome.mods.clone()?;
    let settings: Vec<SettingUpdates> = named
        .iter()
        .filter_map(|n| {
            let relative = by_key(n.tuned().map(relative_updates));
            let projections = relative.into_iter().filter(|(cell, _)| matches!(cell, Cell::Module(_)));
            let mean = |(cell, values): (Cell, Vec<f64>)| Some((cell, over_seeds(&values)?.value));
            let relative = projections.filter_map(mean).collect();
            n.tuned().next().map(|_| SettingUpdates { setting: n.setting.clone(), relative, seeds: n.seeds() })
        })
        .collect();
    (!settings.is_empty()).then_some(Updates { settings, mods })
}

/// √(Σ over phases ‖ΔW‖²) / ‖W before the first phase‖ of each cell. It is ‖ΔW‖ / ‖W‖ of the whole run where the phases
/// move a cell at right angles or only one does; the phases by themselves are in the table of details.
fn relative_updates(tuned: &TunedOutcome) -> Vec<(Cell, f64)> {
    let mut squares: BTreeMap<Cell, f64> = BTreeMap::new();
    for (cell, update) in tuned.updates.phases.iter().flat_map(|phase| &phase.cells) {
        *squares.entry(*cell).or_default() += f64::from(update.delta_norm).powi(2);
    }
    let Some(first) = tuned.updates.phases.first() else { return Vec::new() };
    squares
        .into_iter()
        .filter_map(|(cell, square)| {
            let weight = f64::from(first.cells.get(&cell)?.weight_norm);
            (weight > 0.0).then(|| (cell, square.sqrt() / weight))
        })
        .collect()
}

/// The probe's gap relative to the model as given where every run began above 0, else as it is.
fn drift(outcome: &Outcome, named: &[Named<'_>]) -> Option<Drift> {
    let drawn = |n: &&Named<'_>| n.tuned().next().is_some() && n.tuned().all(|tuned| !tuned.points.is_empty());
    let shown: Vec<&Named<'_>> = named.iter().filter(drawn).collect();
    let first_gap = |tuned: &TunedOutcome| {
        tuned.points.iter().find(|p| p.step == 0).map(|p| p.scores.gap).filter(|gap| *gap > 1e-9)
    };
    let relative = shown.iter().flat_map(|n| n.tuned()).all(|tuned| first_gap(tuned).is_some());
    let points = |tuned: &TunedOutcome| {
        let unit = first_gap(tuned).filter(|_| relative).unwrap_or(1.0);
        tuned.points.iter().map(|p| (p.step, (p.scores.gap / unit, p.scores.refusal))).collect()
    };
    let settings = shown.iter().map(|n| {
        let steps_per_epoch = n.tuned().next().map_or(1, |tuned| tuned.steps_per_epoch.max(1));
        let epochs = by_key(n.tuned().map(points)).into_iter().map(|(step, values)| {
            let (probe, refusal): (Vec<f64>, Vec<Option<f64>>) = values.into_iter().unzip();
            EpochDrift {
                epoch: step as f64 / steps_per_epoch as f64,
                probe: over_seeds(&probe),
                refusal: refusal.into_iter().collect::<Option<Vec<f64>>>().and_then(|values| over_seeds(&values)),
            }
        });
        SettingDrift { setting: n.setting.clone(), epochs: epochs.collect() }
    });
    let layer = outcome.probe.metric_layer;
    let unit = if relative { " (the model as given = 1)" } else { "" };
    let runs = if several(named) {
        format!("means over training {}, bars from the lowest to the highest", seeds_text(&training(named)))
    } else {
        "one training run a setting".into()
    };
    (!shown.is_empty()).then(|| Drift {
        settings: settings.collect(),
        probe_score: format!("gap of the probe at hidden state {layer}{unit}"),
        note: format!("Test split of the security prompts; {runs}."),
    })
}

fn losses(named: &[Named<'_>]) -> Vec<SettingLoss> {
    let loss = |n: &Named<'_>| {
        let mean = |(step, values): (u64, Vec<f64>)| Some((step, over_seeds(&values)?.value));
        let points: Vec<(u64, f64)> =
            by_key(n.tuned().map(|tuned| tuned.losses.clone())).into_iter().filter_map(mean).collect();
        (!points.is_empty()).then(|| SettingLoss { setting: n.setting.clone(), points, seeds: n.seeds() })
    };
    named.iter().filter_map(loss).collect()
}

fn footer(outcome: &Outcome, named: &[Named<'_>], config: &RunConfig, command: &str) -> Footer {
    let noise = outcome.map.as_ref().map(|map| map.seeds.clone()).unwrap_or_default();
    let seeds = [("splits and samples", vec![config.seed]), ("training", training(named)), ("noise", noise)];
    Footer {
        seeds: seeds.into_iter().filter(|(_, s)| !s.is_empty()).map(|(what, s)| (what.to_owned(), s)).collect(),
        versions: vec![
            ("swat".into(), env!("CARGO_PKG_VERSION").into()),
            ("Model hash".into(), outcome.model_hash.clone()),
        ],
        wall_time: Duration::try_from_secs_f64(outcome.seconds).ok(),
        command: command.to_owned(),
    }
}
