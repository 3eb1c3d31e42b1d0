//! Options that would have no effect beside the others are refused: whoever gives one expects something of it.

use crate::error::{Error, Result};
use clap::ArgMatches;
use clap::parser::ValueSource;

/// What an option needs, by the names of arguments.
#[derive(Clone, Copy)]
enum Needs {
    /// Another option, with any value.
    Given(&'static str),
    /// One of two options.
    Either(&'static str, &'static str),
    /// Another option that is not given.
    Absent(&'static str),
    /// Another option with this value.
    Value(&'static str, &'static str),
    /// Another option with a value other than this.
    Other(&'static str, &'static str),
    /// The command does without it.
    Nothing,
}

use Needs::{Absent, Either, Given, Nothing, Other, Value};

/// Command, options, and what they need.
const RULES: &[(&str, &[&str], Needs)] = &[
    ("tune", &["lora_rank", "lora_alpha", "lora_rslora", "lora_modules"], Absent("adapter")),
    ("tune", &["lora_rank", "lora_alpha", "lora_rslora", "lora_modules"], Value("method", "lora")),
    ("tune", &["adapter"], Other("method", "full")),
    ("tune", &["save_dtype", "max_shard_bytes"], Other("save", "adapter")),
    ("tune", &["reversed"], Given("mods")),
    ("tune", &["mods_epochs", "mods_steps", "mods_lr", "rest_lr_factor", "keep_optimizer"], Either("mods", "recipe")),
    ("tune", &["refusal_languages", "refusal_expressions"], Either("screen", "recipe")),
    ("tune", &["decay_all"], Given("weight_decay")),
    ("tune", &["eval_every"], Either("eval_data", "eval_security")),
    ("plan", &["lora_rank"], Value("method", "lora")),
    ("plan", &["mods", "method"], Absent("adapter")),
    ("plan", &["chat_template", "date"], Nothing),
    ("plan", &["link_gb_s", "tflops"], Given("gpus")),
    ("score", &["chat_template", "date"], Nothing),
    ("profile", &["chat_template", "date"], Nothing),
    ("profile", &["recompute", "state"], Value("work", "train")),
    ("generate", &["chat_template", "date"], Absent("raw")),
    ("generate", &["columns", "field", "skip_bad_rows"], Given("chat")),
    ("generate", &["top_p"], Given("temperature")),
    ("generate", &["top_p"], Other("temperature", "0")),
    (
        "eval",
        &["splits", "answer_tokens", "refusals", "refusal_languages", "judge_url", "judge_model"],
        Given("security"),
    ),
    ("eval", &["task_tokens"], Given("task")),
    ("check", &["task_tokens", "max_task_drop"], Given("task")),
    ("check", &["force"], Given("out")),
    ("eval", &["judge_template", "judge_pattern"], Given("judge_model")),
    ("check", &["max_guard_asr_rise", "judge_template", "judge_pattern"], Given("judge_model")),
    ("check", &["attack_examples", "attack_steps", "attack_lr"], Given("attack")),
    ("merge", &["alpha"], Other("by", "safelora")),
    ("merge", &["tau"], Other("by", "path")),
    ("merge", &["tau"], Other("by", "resta")),
    ("merge", &["aligned", "unaligned"], Other("by", "path")),
    ("merge", &["safe"], Value("by", "safemerge")),
    (
        "merge",
        &[
            "security",
            "task",
            "splits",
            "answer_tokens",
            "task_tokens",
            "cache_bytes",
            "refusals",
            "refusal_languages",
            "max_asr_rise",
            "max_over_refusal_rise",
            "max_task_drop",
            "max_j_drop",
            "max_auroc_drop",
            "columns",
            "field",
            "skip_bad_rows",
        ],
        Value("alpha", "auto"),
    ),
    ("merge", &["strict", "max_guard_asr_rise"], Nothing),
    ("secure", &["lora_rank", "lora_alpha", "lora_rslora", "lora_modules"], Value("method", "lora")),
    ("secure", &["task_tokens", "max_task_drop"], Given("task")),
    ("secure", &["max_guard_asr_rise", "judge_template", "judge_pattern"], Given("judge_model")),
    ("secure", &["decay_all"], Given("weight_decay")),
    ("secure", &["reversed"], Nothing),
    ("robustness", &["epsilon", "members"], Other("kind", "zero")),
    ("robustness", &["members"], Other("kind", "scale")),
    ("robustness", &["step_lr", "step_steps", "step_batch_size", "step_batches", "step_max_length"], Given("data")),
    ("robustness", &["members", "retrain", "budget_bytes", "score"], Other("by", "conflict")),
    ("robustness", &["members"], Other("by", "update")),
    (
        "robustness",
        &[
            "chat_template",
            "date",
            "adapter",
            "columns",
            "field",
            "skip_bad_rows",
            "kind",
            "members",
            "split",
            "retrain",
            "budget_bytes",
            "epsilon",
            "cells",
            "by",
            "data",
            "shard",
            "shard_index",
            "shard_count",
            "gpus",
        ],
        Absent("merge"),
    ),
    ("robustness", &["gpus"], Absent("shard")),
    ("robustness", &["gpus"], Absent("shard_index")),
    ("run", &["gpus"], Absent("worker")),
    ("run", &["gpus"], Absent("list_jobs")),
    ("demo", &["out", "seeds", "model"], Absent("make_model")),
    ("demo", &["force"], Given("make_model")),
];

/// Whether a command refuses an option that it shares with others: `--help` does not show it.
pub(super) fn is_refused(command: &str, id: &str) -> bool {
    RULES.iter().any(|(name, ids, needs)| *name == command && ids.contains(&id) && matches!(needs, Nothing))
}

/// Checks the arguments of a command.
///
/// # Errors
/// [`Error::Input`] names the option and what it lacks.
pub(super) fn check(command: &str, matches: &ArgMatches) -> Result<()> {
    let given = |id: &str| {
        matches.try_contains_id(id).is_ok_and(|there| there)
            && matches.value_source(id).is_some_and(|source| source != ValueSource::DefaultValue)
    };
    // Values as they were typed; a default has none.
    let is = |id: &str, value: &str| {
        given(id) && matches.try_get_raw(id).ok().flatten().is_some_and(|mut raw| raw.any(|text| text == value))
    };
    for (name, options, needs) in RULES.iter().filter(|(name, ..)| *name == command) {
        let met = match needs {
            Given(other) => given(other),
            Either(one, other) => given(one) || given(other),
            Absent(other) => !given(other),
            Value(other, value) => is(other, value),
            Other(other, value) => !is(other, value),
            Nothing => false,
        };
        if let Some(option) = options.iter().find(|option| !met && given(option)) {
            let flag = |id: &str| flag(command, id);
            let lacks = match needs {
                Given(other) => format!("without {}", flag(other)),
                Either(one, other) => format!("without {} or {}", flag(one), flag(other)),
                Absent(other) => format!("with {}", flag(other)),
                Value(other, value) => format!("without {} {value}", flag(other)),
                Other(other, value) => format!("with {} {value}", flag(other)),
                Nothing => format!("in swat {name}"),
            };
            let found = format!("an option that has no effect {lacks}");
            return Err(Error::input(flag(option), found, "what it belongs to, or no such option"));
        }
    }
    Ok(())
}

/// The option of a command that its argument `id` is typed as.
fn flag(command: &str, id: &str) -> String {
    let grammar = super::command();
    let args = grammar.find_subcommand(command).into_iter().flat_map(clap::Command::get_arguments);
    let long = args.filter(|arg| arg.get_id() == id).find_map(clap::Arg::get_long);
    format!("--{}", long.unwrap_or(id))
}

#[cfg(test)]
mod tests {
    use super::super::command;
    use super::*;

    #[test]
    fn rules_name_arguments_that_exist() {
        let command = command();
        for (name, options, needs) in RULES {
            let found = command.find_subcommand(name).unwrap_or_else(|| panic!("{name}"));
            let other = match *needs {
                Given(id) | Absent(id) | Either(id, _) | Value(id, _) | Other(id, _) => Some(id),
                Nothing => None,
            };
            for id in options.iter().copied().chain(other) {
                assert!(found.get_arguments().any(|arg| arg.get_id() == id), "{name}: {id}");
            }
        }
    }

    #[test]
    fn options_without_effect_are_refused() {
        let check = |line: &str| {
            let matches = command().try_get_matches_from(line.split(' ')).unwrap();
            let (name, matches) = matches.subcommand().unwrap();
            check(name, matches).map_err(|e| e.to_string())
        };
        let tune = "swat tune --model m --data d --out o";
        for (line, named) in [
            ("--lora-rank 4", "--lora-rank: found an option that has no effect without --method lora"),
            ("--method full --lora-alpha 8", "--lora-alpha"),
            ("--mods-lr 1e-3", "--mods-lr: found an option that has no effect without --mods"),
            ("--reversed", "--reversed"),
            ("--decay-all", "--weight-decay"),
        ] {
            let error = check(&format!("{tune} {line}")).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
        check(&format!("{tune} --method lora --lora-rank 4")).unwrap();
        check(&format!("{tune} --mods m.json --mods-lr 1e-3 --reversed")).unwrap();
        for line in [
            "swat generate --model m --prompt x --top-p 0.9",
            "swat generate --model m --prompt x --temperature 0 --top-p 0.9",
            "swat generate --model m --prompt x --raw --chat-template t",
            "swat score --model m --ids 1 --chat-template t",
            "swat eval --model m --task t --answer-tokens 4",
            "swat eval --model m --security s --task-tokens 4",
            "swat check --model m --against b --security s --max-task-drop 2",
            "swat check --model m --against b --security s --force",
            "swat robustness --model m --probe p --security s --kind zero --epsilon 1",
            "swat profile --model m --work sweep --recompute",
            "swat robustness --merge a b --no-retrain",
            "swat robustness --model m --probe p --security s --shard 0/2 --gpus 2",
            "swat run study.toml --worker --gpus 2",
            "swat robustness --merge a b --by update",
            "swat robustness --model m --probe p --security s --lr 1e-4",
            "swat robustness --model m --probe p --security s --by conflict --data d --members 8",
            "swat check --model m --against b --security s --max-guard-asr-rise 2",
            "swat eval --model m --task t --judge-model g",
            "swat demo --force",
            "swat tune --model m --data d --out o --adapter a --method full",
            "swat plan --model m --adapter a --mods all",
            "swat tune --model m --data d --out o --method lora --save adapter --save-dtype f32",
            "swat tune --model m --data d --out o --rest-lr-factor 0.1",
            "swat generate --model m --prompt x --skip-bad-rows",
            "swat eval --model m --task t --refusal-languages de",
            "swat tune --model m --data d --out o --refusal-languages all",
            "swat robustness --model m --probe p --security s --kind zero --members 4",
            "swat robustness --model m --probe p --security s --kind scale --members 4",
            "swat secure --model m --data d --security s --out o --decay-all",
            "swat secure --model m --data d --security s --out o --reversed",
        ] {
            assert!(check(line).unwrap_err().contains("no effect"), "{line}");
        }
        check("swat generate --model m --prompt x --temperature 0.7 --top-p 0.9").unwrap();
        check("swat profile --model m --work sweep --mods all").unwrap();
        check(&format!("{tune} --recipe swat:mods=all --rest-lr-factor 0.1")).unwrap();
        check("swat robustness --model m --probe p --security s --kind lowrank:2 --members 4").unwrap();
    }
}
