//! `swat replay`: the model's own answers as training data.

use super::common::{Common, print_json, print_line, say};
use super::names::Names;
use super::open::{ModelArgs, OnDevice, Refusals, check_security};
use super::progress::Bars;
use crate::backend::Backend;
use crate::data::{RowOptions, RowReader, SecurityPrompt, Split};
use crate::error::{Error, Result};
use crate::io::file::begins_with;
use crate::io::{IfExists, check_apart, check_file, write_atomic};
use crate::report::{Entry, Table};
use crate::secure::{REPLAY_START, ReplayOptions, ReplaySummary};
use clap::Args;
use std::path::{Path, PathBuf};

/// Writes a model's own refusals of harmful prompts and own answers to benign ones as training data
#[derive(Args)]
#[command(after_help = "Example:
  swat replay --model DIR --security security.jsonl --out replay.jsonl
  swat tune --model DIR --data my.jsonl --mix replay.jsonl --mix-share 0.1 --out tuned
  swat eval --model tuned --security security.jsonl --splits test

Only prompts of the train split are used; where the file has no splits, they are assigned by --seed, so give every
command the same seed. Refusals are recognised by expressions: read the file before you rely on it.")]
pub(super) struct ReplayCommand {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    refusals: Refusals,
    /// Labelled prompts, harmful and benign, of which the train split is used: files, or a set on the hub such as
    /// JailbreakBench/JBB-Behaviors
    #[arg(long, value_name = "FILE_OR_NAME", required = true)]
    security: Vec<PathBuf>,
    #[command(flatten)]
    rows: RowOptions,
    /// Output file: training conversations in the layout messages, refusals first
    #[arg(long, value_name = "FILE", default_value = "replay.jsonl")]
    out: PathBuf,
    #[command(flatten)]
    options: ReplayOptions,
    /// Replace --out
    #[arg(long)]
    force: bool,
}

impl OnDevice for ReplayCommand {
    fn model(&self) -> Option<PathBuf> {
        Some(self.model.model.clone())
    }

    fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        self.model.resolve(names)?;
        names.security(&mut self.security)
    }

    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        let mut inputs = [self.model.inputs(), self.refusals.inputs()].concat();
        inputs.extend(self.security.iter().map(|path| ("--security", path.as_path())));
        check_apart(&[("--out", &self.out)], &inputs)?;
        check_file(&self.out, IfExists::from_force(self.force), |path: &Path| begins_with(path, REPLAY_START))?;
        let mut rows = RowReader::new(&self.rows);
        let prompts = SecurityPrompt::read_all(&self.security, common.seed, &mut rows)?;
        common.end_reading(&rows)?;
        if !prompts.iter().any(|prompt| prompt.split == Split::Train && prompt.is_harmful()) {
            let files: Vec<String> = self.security.iter().map(|path| path.display().to_string()).collect();
            let found = "no harmful prompt in the train split";
            return Err(Error::input(files.join(", "), found, "prompts to be refused"));
        }
        let refusals = self.refusals.list()?;
        let (text, _) = self.model.open_dated(None)?;
        check_security(&text, &prompts)?;
        let model = text.load(backend)?;
        let options = ReplayOptions { seed: common.seed, ..self.options };
        let mut bars = Bars::new(common);
        let (lines, summary) = model.replay(&prompts, &options, &refusals, &mut bars.observer())?;
        bars.finish();
        write_atomic(&self.out, lines.as_bytes())?;
        if summary.benign.kept == 0 {
            say("note: no benign answer was kept: mixed in, refusals alone make a model refuse more\n");
        } else if summary.lacks_long_answers() {
            say(&format!(
                "note: {} benign answers are longer than {} tokens and were dropped: with too few beside the refusals, a \
                 model refuses more; raise --answer-tokens\n",
                summary.benign.cut_off, options.answer_tokens
            ));
        }
        if common.json {
            return print_json(&summary);
        }
        print_line(table(&summary).text().trim_end())?;
        print_line(&format!("saved as {}", self.out.display()))
    }
}

fn table(ReplaySummary { harmful, benign }: &ReplaySummary) -> Table {
    let mut table = Table::new("Prompts of the train split").column("").numbers("harmful", "").numbers("benign", "");
    for (what, harmful, benign) in [
        ("prompts", harmful.prompts, benign.prompts),
        ("kept: refusals of harmful, answers to benign", harmful.kept, benign.kept),
        ("dropped: answered harmful, refused benign", harmful.other_behaviour, benign.other_behaviour),
        ("dropped: cut off by --answer-tokens", harmful.cut_off, benign.cut_off),
        ("dropped: empty", harmful.empty, benign.empty),
        ("dropped: incoherent", harmful.incoherent, benign.incoherent),
        ("dropped: repeats another", harmful.repeated, benign.repeated),
        ("dropped: also in another split", harmful.held_out, benign.held_out),
        ("not needed", harmful.not_needed, benign.not_needed),
    ] {
        table.row([Entry::text(what), Entry::count(harmful as u64), Entry::count(benign as u64)]);
    }
    table
}
