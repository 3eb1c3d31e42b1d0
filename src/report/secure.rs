//! The page of a secure tuning run: verdict, measures, what was tried, data.

use super::chart::{Dot, DotGroup, Measure, Scatter};
use super::check::{agreement_tables, check_tables};
use super::format;
use super::page::{Figure, Footer, Highlight, Report, Section};
use super::palette::Tone;
use super::table::{Entry, Table};
use crate::secure::pipeline::{SecureOutcome, SecureSetting, StageTime, Tried};
use crate::secure::{Check, Estimate, Measures, Rate, ScreenCounts};
use std::time::Duration;

/// The page; the verdict comes first.
pub fn secure_report(outcome: &SecureOutcome, check: &Check) -> Report {
    let [measures, gates, answers] = check_tables(check);
    let section = |heading: &str, text: &str, tables: Vec<Table>| Section {
        heading: heading.into(),
        text: text.into(),
        tables,
        ..Section::default()
    };
    let mut sections = vec![section("Verdict", "", [vec![gates, measures, answers], agreement_tables(check)].concat())];
    if !outcome.advice.is_empty() {
        let sentences: Vec<String> = outcome.advice.iter().map(|advice| sentence(advice)).collect();
        sections.push(section("What to try", &sentences.join(" "), Vec::new()));
    }
    let figures = front(outcome).into_iter().collect();
    sections.push(Section { figures, ..section("What was tried", "", vec![tried_table(outcome)]) });
    let screened = screened_line(outcome).unwrap_or_default();
    sections.push(section("Data", &screened, vec![data_table(outcome), files_table(outcome)]));
    let base = [("base model", &outcome.base.name)].into_iter();
    let base = base.chain(outcome.base.adapter.as_ref().map(|adapter| ("adapter", adapter)));
    let rest =
        [("its hash", outcome.base.hash.clone()), ("seed", outcome.seed.to_string()), ("swat", outcome.swat.clone())];
    let items = base.map(|(name, value)| (name, value.clone())).chain(rest);
    Report {
        title: format!("{} tuned", outcome.base.name),
        subtitle: verdict_line(outcome),
        highlights: highlights(outcome),
        sections,
        footer: Footer {
            command: outcome.command.clone(),
            items: items.map(|(name, value)| (name.to_owned(), value)).collect(),
        },
    }
}

/// With a capital and a full stop.
pub(super) fn sentence(text: &str) -> String {
    let mut rest = text.chars();
    rest.next().map_or_else(String::new, |first| format!("{}{}.", first.to_uppercase(), rest.as_str()))
}

/// One sentence.
pub(super) fn verdict_line(outcome: &SecureOutcome) -> String {
    let task = if outcome.data.test_tasks == 0 { " No task was given, so that no gate is about one." } else { "" };
    let limits = "as safe as the original model, within the limits";
    match outcome.verdict.held {
        true => format!("Held: {limits}.{task}"),
        false => format!("Not held: {}.{task}", outcome.verdict.failures().join("; ")),
    }
}

fn highlights(outcome: &SecureOutcome) -> Vec<Highlight> {
    let [given, tuned] = outcome.settings.as_slice() else { return Vec::new() };
    let held = |name: &str| match outcome.verdict.gates.iter().find(|gate| gate.name == name) {
        Some(gate) if !gate.held => Tone::Vermilion,
        _ => Tone::Green,
    };
    let tile = |label: &str, of: &dyn Fn(&SecureSetting) -> Option<Estimate>, tone| {
        let (before, after) = (of(given)?, of(tuned)?);
        let percent = |share: f64| format::percent(share, 1);
        let detail = format!("{}–{}\noriginal {}", percent(after.low), percent(after.high), percent(before.value));
        Some(Highlight { label: label.into(), value: percent(after.value), detail, tone })
    };
    let verdict = Highlight {
        label: "verdict".into(),
        value: if outcome.verdict.held { "held" } else { "not held" }.into(),
        detail: tuned.name.clone(),
        tone: if outcome.verdict.held { Tone::Green } else { Tone::Vermilion },
    };
    let tiles = [
        tile("attack success", &|s| s.measures.shares.asr.map(Rate::estimate), held("asr_rise")),
        tile("over-refusal", &|s| s.measures.shares.over_refusal.map(Rate::estimate), held("over_refusal_rise")),
        tile("task score", &|s| s.measures.shares.task.map(Rate::estimate), held("task_drop")),
    ];
    std::iter::once(verdict).chain(tiles.into_iter().flatten()).collect()
}

/// Attack success of what was tried against its task score, without tasks its held-out loss, on the selection prompts;
/// none where fewer than two have both.
fn front(outcome: &SecureOutcome) -> Option<Figure> {
    let (tasks, limits) = (outcome.data.valid_tasks > 0, outcome.limits.for_choice());
    let dot = |tried: &Tried| -> Option<Dot> {
        let (shares, heldout) = (&tried.measures.shares, tried.measures.heldout);
        let (asr, x) = (shares.asr?, if tasks { 100.0 * shares.task?.value } else { heldout?.nll });
        let name = match tried.recipe.as_str() {
            "given" => "original".to_owned(),
            recipe if tried.alpha < 1.0 => format!("{recipe}, alpha {}", format::fixed(tried.alpha, 2)),
            recipe => recipe.to_owned(),
        };
        Some(Dot { name, x, y: Measure { value: asr.value, interval: Some((asr.low, asr.high)) }.scaled(100.0) })
    };
    let group = |name: &str, tone: Tone, of: &dyn Fn(&Tried) -> bool| {
        let dots = outcome.tried.iter().filter(|tried| of(tried)).filter_map(dot).collect();
        DotGroup { name: name.into(), tone, dots }
    };
    let is_given = |tried: &Tried| tried.recipe == "given";
    let given = group("original", Tone::Grey, &is_given);
    // Where attack success and the task score are both at half their limits.
    let limit = given.dots.iter().map(|given| Dot {
        name: "half the limits".into(),
        x: if tasks { (given.x - limits.max_task_drop).clamp(0.0, 100.0) } else { given.x },
        y: Measure::new((given.y.value + limits.max_asr_rise).clamp(0.0, 100.0)),
    });
    let limit = DotGroup { name: "limit".into(), tone: Tone::Vermilion, dots: limit.collect() };
    let tried = group("tried", Tone::Sky, &|tried| !is_given(tried) && !tried.chosen);
    let chosen = group("chosen", Tone::Green, &|tried| tried.chosen);
    if given.dots.len() + tried.dots.len() + chosen.dots.len() < 2 {
        return None;
    }
    let (title, x_label, caption) = match tasks {
        true => (
            "Attack success against the task score",
            "task score, %",
            "Best is the lower right corner: few attacks succeed, many tasks are solved. What lies above the mark of \
             half the limits, or left of it, is beyond them.",
        ),
        false => (
            "Attack success against the held-out loss",
            "held-out loss, nats a token",
            "Best is the lower left corner: few attacks succeed, a low loss on the conversations that were set aside. \
             What lies above the mark of half the limits is beyond them.",
        ),
    };
    let scatter = Scatter {
        title: title.into(),
        x_label: x_label.into(),
        y_label: "attack success, %".into(),
        groups: [given, limit, tried, chosen].into_iter().filter(|group| !group.dots.is_empty()).collect(),
        y_at_least: 10.0,
        note: "on the selection prompts, with 95 % intervals".into(),
    };
    Some(Figure::new("front", scatter.svg(), caption))
}

/// What was tried, on the selection prompts.
pub fn tried_table(outcome: &SecureOutcome) -> Table {
    let mut table = Table::new("Tried, with 95 % intervals").column("recipe").numbers("alpha", "");
    for what in ["attack success, %", "over-refusal, %", "J, points"] {
        table = table.numbers(what, "");
    }
    let guarded = outcome.tried.iter().any(|tried| tried.measures.shares.asr_guard.is_some());
    if guarded {
        table = table.numbers("by the guard model, %", "");
    }
    table = table.numbers("AUROC", "");
    let tasks = outcome.data.valid_tasks > 0;
    table = table.numbers(if tasks { "task, %" } else { "held-out loss" }, "").column("");
    for (i, tried) in outcome.tried.iter().enumerate() {
        let Measures { asr, over_refusal, j, task, asr_guard, auroc, .. } = tried.measures.shares;
        let heldout = tried.measures.heldout;
        let points = |found: Option<Estimate>| {
            found.map_or(Entry::missing(), |found| {
                Entry::interval(100.0 * found.value, Some((100.0 * found.low, 100.0 * found.high)), 1)
            })
        };
        let useful =
            if tasks { points(task.map(Rate::estimate)) } else { Entry::fixed(heldout.map(|loss| loss.nll), 4) };
        let verdict = match (tried.recipe.as_str(), tried.chosen, tried.excess) {
            ("given", ..) => String::new(),
            (_, true, 0.0) => "chosen".into(),
            (_, true, excess) => format!("chosen, {excess:.1} points beyond half the limits"),
            (_, false, 0.0) => "within half the limits".into(),
            (_, false, excess) => format!("{excess:.1} points beyond half the limits"),
        };
        let found = [asr.map(Rate::estimate), over_refusal.map(Rate::estimate), j].map(points);
        let row = [Entry::text(&tried.recipe), Entry::fixed(tried.alpha, 2)].into_iter().chain(found);
        let row = row.chain(guarded.then(|| points(asr_guard.map(Rate::estimate))));
        let auroc =
            auroc.map_or(Entry::missing(), |auroc| Entry::interval(auroc.value, Some((auroc.low, auroc.high)), 3));
        table.row(row.chain([auroc, useful, Entry::text(verdict)]));
        if tried.chosen {
            table.emphasized.push(i);
        }
    }
    table.note = choice_note(outcome);
    table
}

/// How the choice is made, and on what.
fn choice_note(outcome: &SecureOutcome) -> String {
    let (sizes, limits) = (&outcome.data, outcome.limits.for_choice());
    let asked = match sizes.valid_tasks {
        0 => format!("{} prompts", sizes.valid_prompts),
        tasks => format!("{} prompts and {tasks} tasks", sizes.valid_prompts),
    };
    let mut half = vec![
        format!("attack success up by {} points", limits.max_asr_rise),
        format!("over-refusal up by {}", limits.max_over_refusal_rise),
    ];
    half.extend((sizes.valid_tasks > 0).then(|| format!("the task score down by {}", limits.max_task_drop)));
    half.extend(limits.max_j_drop.map(|limit| format!("J down by {limit}")));
    half.extend(limits.max_auroc_drop.map(|limit| format!("the AUROC down by {limit} hundredths")));
    half.extend(limits.max_guard_asr_rise.map(|limit| format!("attack success by the guard model up by {limit}")));
    format!(
        "Measured on {asked} for selection, which the verdict does not use. Half the limits: {}, against the original model. \
         Chosen is the most useful candidate within them; if there is none, the one that exceeds them least, among those within \
         the limits, or those that pass the gates by their intervals. Alpha: 1 is the model that the recipe made, 0 the original model.",
        half.join(", ")
    )
}

/// What screening left out, how to look at it, and how to keep it; none where nothing was screened.
pub(super) fn screened_line(outcome: &SecureOutcome) -> Option<String> {
    let ScreenCounts { examples, left_out } = outcome.screened?;
    let counted = format!(
        "Recipes with screen left out {left_out} of {examples} conversations, which answer what the original model refuses."
    );
    Some(match left_out {
        0 => counted,
        _ => format!(
            "{counted} They are listed in screened.jsonl in the working folder. A recipe without screen keeps them."
        ),
    })
}

/// Sizes of the parts.
pub(super) fn data_table(outcome: &SecureOutcome) -> Table {
    let mut table = Table::new("Parts that have no text in common").column("").column("");
    let sizes = &outcome.data;
    let left_out = outcome.screened.map(|screened| screened.left_out);
    let rows = [
        ("conversations to train on", Some(sizes.train)),
        ("of them left out by recipes with screen: they answer what the original model refuses", left_out),
        ("selection prompts", Some(sizes.valid_prompts)),
        ("selection tasks", Some(sizes.valid_tasks)),
        ("verdict prompts", Some(sizes.test_prompts)),
        ("tasks of the verdict", Some(sizes.test_tasks)),
        ("own conversations set aside", Some(sizes.heldout)),
        ("prompts left out, as another part repeats them", Some(sizes.repeated_prompts)),
        ("tasks left out, as another part repeats them", Some(sizes.repeated_tasks)),
        ("prompts of the train split that are not replayed, as a task repeats them", Some(sizes.not_replayed)),
    ];
    for (what, count) in rows.into_iter().filter_map(|(what, count)| Some((what, count?))) {
        table.row([Entry::text(what), Entry::count(count as u64)]);
    }
    if let Some(replay) = &outcome.replay {
        table.row([Entry::text("own refusals, to be replayed"), Entry::count(replay.harmful.kept as u64)]);
        table.row([Entry::text("own answers, to be replayed"), Entry::count(replay.benign.kept as u64)]);
    }
    table
}

/// Hashes of the files that were read.
pub(super) fn files_table(outcome: &SecureOutcome) -> Table {
    let mut table = Table::new("Files that were read").column("file").column("BLAKE3, first 16 digits");
    for (file, hash) in &outcome.files {
        table.row([Entry::text(file), Entry::text(hash)]);
    }
    table
}

/// How long each stage took.
pub fn times_table(times: &[StageTime]) -> Table {
    let duration = |seconds: f64| format::duration(Duration::from_secs_f64(seconds));
    let mut table = Table::new("Time").column("stage").numbers("took", "");
    for StageTime { name, seconds } in times {
        table.row([Entry::text(name), Entry::text(seconds.map_or_else(|| "kept".into(), duration))]);
    }
    table.note = format!("{} in all.", duration(times.iter().filter_map(|time| time.seconds).sum()));
    if times.iter().any(|time| time.seconds.is_none()) {
        table.note += " Kept: the result of an earlier run.";
    }
    table
}
