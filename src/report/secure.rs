//! The page of a secure tuning run: verdict, measures, what was tried, data.

use super::check::{agreement_tables, check_tables};
use super::format;
use super::page::{Footer, Highlight, Report, Section};
use super::palette::Tone;
use super::table::{Entry, Table};
use crate::secure::pipeline::{SecureOutcome, SecureSetting};
use crate::secure::{Check, Estimate, Measures, Rate, ScreenCounts};

/// The page; the verdict comes first.
pub fn secure_report(outcome: &SecureOutcome, check: &Check) -> Report {
    let [measures, gates] = check_tables(check);
    let section = |heading: &str, text: &str, tables: Vec<Table>| Section {
        heading: heading.into(),
        text: text.into(),
        tables,
        ..Section::default()
    };
    let sections = vec![
        section("Verdict", "", [vec![gates, measures], agreement_tables(check)].concat()),
        section(
            "What was tried",
            "Measured on the prompts of the choice, which the verdict does not use. The most useful of those within half of \
             each limit is chosen. If none is, the one that exceeds these halves least, among those within the limits if \
             there are any.",
            vec![tried_table(outcome)],
        ),
        section("Data", &screened_line(outcome).unwrap_or_default(), vec![data_table(outcome)]),
    ];
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

/// One sentence.
pub(super) fn verdict_line(outcome: &SecureOutcome) -> String {
    let gates = outcome.verdict.gates.iter().filter(|gate| !gate.held);
    let failed: Vec<String> = gates
        .map(|gate| format!("{} by {} points, limit {}", gate.what(), format::fixed(gate.value, 1), gate.limit))
        .collect();
    let task = if outcome.data.test_tasks == 0 { " No task was given, so that no gate is about one." } else { "" };
    let limits = "as safe as the model as given, within the limits";
    match outcome.verdict.held {
        true => format!("Held: {limits}.{task}"),
        false => format!("Not held: {}.{task}", failed.join("; ")),
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
        let detail = format!("{}–{}\nas given {}", percent(after.low), percent(after.high), percent(before.value));
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

/// What was tried, on the prompts of the choice.
pub fn tried_table(outcome: &SecureOutcome) -> Table {
    let mut table = Table::new("Tried, with 95 % intervals").column("recipe").numbers("alpha", "");
    for what in ["attack success, %", "over-refusal, %", "J, points"] {
        table = table.numbers(what, "");
    }
    let guarded = outcome.tried.iter().any(|tried| tried.measures.shares.asr_guard.is_some());
    if guarded {
        table = table.numbers("by the guard model, %", "");
    }
    let tasks = outcome.data.valid_tasks > 0;
    table = table.numbers(if tasks { "task, %" } else { "held-out loss" }, "").column("");
    for (i, tried) in outcome.tried.iter().enumerate() {
        let Measures { asr, over_refusal, j, task, asr_guard, .. } = tried.measures.shares;
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
        table.row(row.chain([useful, Entry::text(verdict)]));
        if tried.chosen {
            table.emphasized.push(i);
        }
    }
    table
}

/// What screening left out, how to look at it, and how to keep it; none where nothing was screened.
pub(super) fn screened_line(outcome: &SecureOutcome) -> Option<String> {
    let ScreenCounts { examples, left_out } = outcome.screened?;
    let counted = format!(
        "Recipes with screen left out {left_out} of {examples} conversations, which answer what the model as given refuses."
    );
    Some(match left_out {
        0 => counted,
        _ => format!(
            "{counted} They are listed in screened.jsonl in the working folder. A recipe without screen keeps them."
        ),
    })
}

/// Sizes of the parts, and hashes of the files.
pub(super) fn data_table(outcome: &SecureOutcome) -> Table {
    let mut table = Table::new("Parts that have no text in common").column("").column("");
    let sizes = &outcome.data;
    for (what, count) in [
        ("conversations trained on", sizes.train),
        ("prompts of the choice", sizes.valid_prompts),
        ("tasks of the choice", sizes.valid_tasks),
        ("prompts of the verdict", sizes.test_prompts),
        ("tasks of the verdict", sizes.test_tasks),
        ("own conversations set aside", sizes.heldout),
        ("prompts left out, as another part repeats them", sizes.repeated_prompts),
        ("tasks left out, as another part repeats them", sizes.repeated_tasks),
    ] {
        table.row([Entry::text(what), Entry::count(count as u64)]);
    }
    if let Some(screened) = &outcome.screened {
        let what = "of them left out by recipes with screen: they answer what the model as given refuses";
        table.row([Entry::text(what), Entry::count(screened.left_out as u64)]);
    }
    if let Some(replay) = &outcome.replay {
        table.row([Entry::text("own refusals, to be replayed"), Entry::count(replay.harmful.kept as u64)]);
        table.row([Entry::text("own answers, to be replayed"), Entry::count(replay.benign.kept as u64)]);
    }
    for (file, hash) in &outcome.files {
        table.row([Entry::text(file), Entry::text(hash)]);
    }
    table
}
