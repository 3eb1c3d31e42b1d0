//! `swat screen`: the risky lines of training data.

use super::common::{Common, print_json, print_line, say};
use super::names::Names;
use super::open::{ModelArgs, OnDevice, Refusals, check_security};
use super::progress::Bars;
use crate::backend::Backend;
use crate::data::{RowOptions, RowReader, SecurityPrompt};
use crate::error::Result;
use crate::io::file::begins_with;
use crate::io::{IfExists, check_apart, check_file, write_atomic};
use crate::report::{Entry, Table};
use crate::secure::{Probe, ProbeOptions, REFUSAL_TOKENS, SCREEN_START, ScreenOptions, ScreenRow};
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Lines of the printed table.
const SHOWN: usize = 10;

/// Lists the lines of training data that would move a model most towards compliance, before it is trained on them
#[derive(Args)]
#[command(after_help = "Examples:
  swat screen --model DIR --data my.jsonl --security security.jsonl --out risky.jsonl
  swat screen --model DIR --data my.jsonl --probe probe.safetensors --out risky.jsonl --top 0

Each line's last answer is compared with the model's own answer to the same question, along the direction that tells the
model's refusals from its other answers. The output holds the lines as they are, highest score first, behind the key
`screen` with score, file and line, and `refused`: whether the line answers a question that the model refuses. Read it, and
leave out of the data what should not be there; `swat tune --screen` leaves out the lines that are `refused`.")]
pub(super) struct ScreenCommand {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    refusals: Refusals,
    /// Training conversations: a file, or a name on the hub: org/name[/config][:split]
    #[arg(long, value_name = "FILE_OR_NAME", required = true, num_args = 1..)]
    data: Vec<PathBuf>,
    #[command(flatten)]
    rows: RowOptions,
    /// Labelled prompts, whose refusals give the direction: files, or a set on the hub such as
    /// JailbreakBench/JBB-Behaviors
    #[arg(long, value_name = "FILE_OR_NAME", required_unless_present = "probe", conflicts_with = "probe")]
    security: Vec<PathBuf>,
    /// Probes of `swat probe` of the same model, in place of --security
    #[arg(long, value_name = "FILE")]
    probe: Option<PathBuf>,
    #[command(flatten)]
    options: ScreenOptions,
    /// Output file, JSON Lines
    #[arg(long, value_name = "FILE", default_value = "risky.jsonl")]
    out: PathBuf,
    /// Replace --out
    #[arg(long)]
    force: bool,
}

impl OnDevice for ScreenCommand {
    fn model(&self) -> Option<PathBuf> {
        Some(self.model.model.clone())
    }

    fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        self.model.resolve(names)?;
        names.data(&mut self.data)?;
        names.security(&mut self.security)
    }

    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        let mut inputs = [self.model.inputs(), self.refusals.inputs()].concat();
        inputs.extend(self.data.iter().map(|path| ("--data", path.as_path())));
        inputs.extend(self.security.iter().map(|path| ("--security", path.as_path())));
        inputs.extend(self.probe.iter().map(|path| ("--probe", path.as_path())));
        check_apart(&[("--out", &self.out)], &inputs)?;
        check_file(&self.out, IfExists::from_force(self.force), |path: &Path| begins_with(path, SCREEN_START))?;
        let mut rows = RowReader::new(&self.rows);
        let mut data = Vec::new();
        for path in &self.data {
            data.extend(ScreenRow::read(path, &mut rows)?);
        }
        let prompts = match self.security.first() {
            None => Vec::new(),
            Some(first) => {
                let prompts = SecurityPrompt::read_all(&self.security, common.seed, &mut rows)?;
                SecurityPrompt::require_both_labels(&prompts, first)?;
                prompts
            }
        };
        common.end_reading(&rows)?;
        let refusals = self.refusals.list()?;
        let probe = self.probe.as_deref().map(Probe::load).transpose()?;
        let (text, _) = self.model.open_dated(probe.as_ref().and_then(|probe| probe.metadata.date))?;
        if let Some(probe) = &probe {
            probe.check_model(&text.files.config, text.files.hash()?)?;
        }
        check_security(&text, &prompts)?;
        let model = text.load(backend)?;
        let mut bars = Bars::new(common);
        let probe = match probe {
            Some(probe) => probe,
            None => {
                let options = ProbeOptions { seed: common.seed, ..ProbeOptions::default() };
                model.train_probe(&prompts, &options, REFUSAL_TOKENS, &refusals, &mut bars.observer())?
            }
        };
        let found = model.screen(&probe, &refusals, &data, &self.options, &mut bars.observer())?;
        bars.finish();
        write_atomic(&self.out, found.lines(&data, self.options.top).as_bytes())?;
        if common.json {
            return print_json(&json!({ "out": self.out, "rows": found.rows, "unscored": found.unscored,
                "refused": found.refused, "layer": found.layer, "scores": found.scores }));
        }
        let mut table = Table::new("Lines that move the model most towards compliance");
        table = table.column("line").numbers("score", "").column("");
        for row in found.scores.iter().take(SHOWN) {
            let refused = if row.refused { "answers what the model refuses" } else { "" };
            let line = Entry::text(format!("{}:{}", row.file, row.line));
            table.row([line, Entry::fixed(row.score, 3), Entry::text(refused)]);
        }
        let positive = found.scores.iter().filter(|row| row.score > 0.0).count();
        table.note = format!("{positive} of {} scores are above 0; hidden state {}", found.scores.len(), found.layer);
        print_line(table.text().trim_end())?;
        if found.unscored > 0 {
            say(&format!("note: {} of {} rows have no answer that could be compared\n", found.unscored, found.rows));
        }
        print_line(&format!(
            "{} of {} rows answer what the model refuses: `swat tune --screen` leaves them out",
            found.refused, found.rows
        ))?;
        print_line(&format!("saved as {}", self.out.display()))
    }
}
