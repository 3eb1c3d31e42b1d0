//! A check as tables.

use super::table::{Entry, Table};
use crate::secure::{Agreement, AnswerKinds, Check, CheckedModel, Estimate, Gate, Rate, Verdict};

/// Kinds of answers of one model.
type KindsOf = fn(&CheckedModel) -> Option<AnswerKinds>;

/// What was asked, with the kinds of the answers to it.
const ASKED: [(&str, KindsOf); 3] = [
    ("harmful prompts", |model| model.harmful_answers),
    ("benign prompts", |model| model.benign_answers),
    ("tasks", |model| model.task_answers),
];

/// Measures of both models, gates with their verdict, and what the answers are, which is not gated.
pub fn check_tables(check: &Check) -> [Table; 3] {
    [measures(check), verdict(check), answers(check)]
}

/// A table with a column for each model.
fn of_models(check: &Check, caption: &str) -> Table {
    check.settings.iter().fold(Table::new(caption).column(""), |table, model| table.numbers(&model.name, ""))
}

/// Adds a row, unless no model has the measure.
fn add_row(
    table: &mut Table,
    check: &Check,
    what: &str,
    of: &dyn Fn(&CheckedModel) -> Option<Estimate>,
    (factor, decimals): (f64, usize),
) {
    let entry = |model: &CheckedModel| {
        of(model).map_or(Entry::missing(), |found| {
            let interval = Some((factor * found.low, factor * found.high));
            Entry::interval(factor * found.value, interval, decimals)
        })
    };
    if check.settings.iter().any(|model| of(model).is_some()) {
        table.row(std::iter::once(Entry::text(what)).chain(check.settings.iter().map(entry)));
    }
}

fn measures(check: &Check) -> Table {
    let mut table = of_models(check, "Measures, with 95 % intervals");
    let mut row = |what: &str, of: &dyn Fn(&CheckedModel) -> Option<Estimate>, shown: (f64, usize)| {
        add_row(&mut table, check, what, of, shown);
    };
    row("attack success, %", &|model| model.asr.map(Rate::estimate), (100.0, 1));
    row("over-refusal, %", &|model| model.over_refusal.map(Rate::estimate), (100.0, 1));
    row("J: refused harmful - refused benign, points", &|model| model.j, (100.0, 1));
    row("attack success by the guard model, %", &|model| model.asr_guard.map(Rate::estimate), (100.0, 1));
    row("AUROC of the refusal log-odds", &|model| model.auroc, (1.0, 3));
    row("task accuracy, %", &|model| model.task.map(Rate::estimate), (100.0, 1));
    table
}

/// Coherent attack success, and the answers that are empty, incoherent or cut off.
fn answers(check: &Check) -> Table {
    let mut table = of_models(check, "Answers, with 95 % intervals; not gated");
    let mut row = |what: &str, of: &dyn Fn(&CheckedModel) -> Option<Rate>| {
        add_row(&mut table, check, what, &|model| of(model).map(Rate::estimate), (100.0, 1));
    };
    row("attack success by coherent answers, %", &|model| model.asr_coherent);
    for (asked, kinds) in ASKED {
        row(&format!("answers to {asked}: empty, %"), &|model| kinds(model).map(|kinds| kinds.empty));
        row(&format!("answers to {asked}: incoherent, %"), &|model| kinds(model).map(|kinds| kinds.incoherent));
        row(&format!("answers to {asked}: cut off, %"), &|model| kinds(model).map(|kinds| kinds.cut_off));
    }
    table.note = "Empty and incoherent answers hold no refusal expression, so that attack success counts them.".into();
    table
}

fn verdict(check: &Check) -> Table {
    let held = if check.verdict.held { "Verdict: held" } else { "Verdict: not held" };
    let mut table = Table::new(held).column("").numbers("points", "").numbers("limit", "").column("verdict");
    add_gates(&mut table, &check.verdict);
    if check.verdict.gates.iter().any(|gate: &Gate| !gate.certain) {
        table.note =
            "Within the interval: the limit lies inside the interval of the change; more prompts narrow it.".into();
    }
    table
}

/// A row for each gate: what it is about, its change with interval, its limit, and whether it is held.
pub(super) fn add_gates(table: &mut Table, verdict: &Verdict) {
    for gate in &verdict.gates {
        let verdict = match (gate.held, gate.certain) {
            (true, true) => "held",
            (false, true) => "not held",
            (true, false) => "held, within the interval",
            (false, false) => "not held, within the interval",
        };
        let value = Entry::interval(gate.value, None, 1);
        let value = Entry { detail: format!("({:.1} to {:.1})", gate.low, gate.high), ..value };
        table.row([Entry::text(gate.what()), value, Entry::fixed(gate.limit, 1), Entry::text(verdict)]);
    }
    for what in verdict.unmeasured() {
        table.row([Entry::text(what), Entry::missing(), Entry::missing(), Entry::text("not held, not measured")]);
    }
}

/// Agreement between the judges of each model of a check; none without a judge beside the refusal expressions.
pub fn agreement_tables(check: &Check) -> Vec<Table> {
    let judged = check.settings.iter().filter(|model| !model.agreement.is_empty());
    let table = |model: &CheckedModel| {
        let mut table = agreement_table(&model.agreement);
        table.caption = format!("{}, {}", table.caption, model.name);
        table
    };
    judged.map(table).collect()
}

/// Agreement between judges of the same answers.
pub fn agreement_table(all: &[Agreement]) -> Table {
    let mut table = Table::new("Agreement between judges")
        .column("judges")
        .numbers("answers", "")
        .numbers("agreed, %", "")
        .numbers("Cohen's kappa", "");
    for Agreement { judges, answers, agreed, kappa, low, high } in all {
        let kappa = kappa.map_or(Entry::missing(), |kappa| Entry::interval(kappa, low.zip(*high), 2));
        let names = Entry::text(judges.join(" and "));
        table.row([names, Entry::count(*answers as u64), Entry::fixed(100.0 * agreed, 1), kappa]);
    }
    table.note =
        "On whether an attack succeeds. Expressions: the answer holds no refusal expression. Kappa is 0 where \
                  judges agree no more than by chance; it has no value where they say the same of all answers."
            .into();
    table
}
