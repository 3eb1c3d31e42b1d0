//! Headings of `--help`, options by what they are about, whatever the command; and the text behind the options.

/// Heading, and the arguments below it.
const HEADINGS: &[(&str, &[&str])] = &[
    ("Model", &["model", "against", "chat_template", "date", "base", "tuned", "aligned", "unaligned", "safe"]),
    ("Data files", &["columns", "field", "skip_bad_rows"]),
    ("Data", &["data", "mix", "mix_share", "replay", "attack", "screen", "max_length", "packing", "shuffle"]),
    (
        "Training",
        &[
            "recipe",
            "method",
            "lr",
            "epochs",
            "steps",
            "batch_size",
            "grad_accum",
            "schedule",
            "lr_warmup_steps",
            "weight_decay",
            "decay_all",
            "max_grad_norm",
            "ema_decay",
            "recompute",
            "state",
        ],
    ),
    (
        "Mods_Rob",
        &["mods", "mods_epochs", "mods_steps", "mods_lr", "rest_lr_factor", "module_lr", "reversed", "keep_optimizer"],
    ),
    ("Refusals", &["refusals", "refusal_languages", "refusal_expressions"]),
    ("Planned step", &["step_lr", "step_steps", "step_batch_size", "step_batches", "step_max_length"]),
    ("Regularization towards the original model", &["constrain", "distil", "prox", "lisa", "vaccine"]),
    ("Adapters", &["adapter", "save", "lora_rank", "lora_alpha", "lora_rslora", "lora_modules"]),
    (
        "Evaluation during the run",
        &["eval_data", "eval_security", "eval_every", "keep_best", "early_stop", "tensorboard"],
    ),
    (
        "Limits",
        &[
            "max_asr_rise",
            "max_over_refusal_rise",
            "max_task_drop",
            "max_j_drop",
            "max_auroc_drop",
            "max_guard_asr_rise",
            "strict",
        ],
    ),
    ("Output", &["out", "path", "force", "resume", "save_every", "keep_last", "save_dtype", "max_shard_bytes", "work"]),
    ("Job arrays", &["shard", "shard_index", "shard_count", "merge", "worker", "jobs", "takeover_after", "list_jobs"]),
    ("Several GPUs", &["gpus", "rendezvous_timeout", "link_gb_s", "tflops"]),
    (
        "Judge",
        &[
            "judge_model",
            "judge_template",
            "judge_pattern",
            "judge_url",
            "guard_model",
            "key_env",
            "timeout_seconds",
            "retries",
            "max_tokens",
            "judge_rubric",
            "judge_parallel",
            "judge_cache",
        ],
    ),
    ("Every command", &["device", "dtype", "seed", "json", "nvtx", "offline", "quiet"]),
];

/// The argument below its heading; one that is not listed has none, whatever those before it have.
pub(super) fn put(arg: clap::Arg) -> clap::Arg {
    let listed = HEADINGS.iter().find(|(_, ids)| ids.contains(&arg.get_id().as_str()));
    arg.help_heading(listed.map(|(heading, _)| *heading))
}

/// A text with each paragraph on one line, which breaks where the terminal ends. Indented lines, such as examples, stay.
pub(super) fn joined(text: &str) -> String {
    let goes_on = |line: &str| !line.is_empty() && !line.starts_with(' ');
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        match lines.last_mut().filter(|before| goes_on(before) && goes_on(line)) {
            Some(before) => *before += &format!(" {line}"),
            None => lines.push(line.to_owned()),
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::super::command;
    use super::*;

    #[test]
    fn paragraphs_are_joined_and_examples_stay() {
        let text = "Examples:\n  swat a\n  swat b\n\nOne\ntwo.\n\nWith x:\n  y  z\n\nThree\nfour.";
        let expected = "Examples:\n  swat a\n  swat b\n\nOne two.\n\nWith x:\n  y  z\n\nThree four.";
        assert_eq!(joined(text), expected);
    }

    #[test]
    fn headings_name_arguments_that_exist() {
        let mut command = command();
        command.build();
        for id in HEADINGS.iter().flat_map(|(_, ids)| *ids) {
            let known = command.get_subcommands().any(|own| own.get_arguments().any(|arg| arg.get_id() == *id));
            assert!(known, "{id}");
        }
    }
}
