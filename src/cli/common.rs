//! Options and output of every command.

use crate::backend::DtypeChoice;
use crate::data::{RowReader, SkippedRows};
use crate::error::{Error, FileOp, Result};
use crate::io::json;
use crate::options::whole;
use clap::Args;
use serde::Serialize;
use std::io::Write;
use std::str::FromStr;

/// Options of every command.
#[derive(Args, Clone, Debug)]
pub(super) struct Common {
    /// Device: auto, cpu, cuda or cuda:N. auto uses a working GPU, and says which
    #[arg(long, default_value = "auto", global = true)]
    pub(super) device: Device,
    /// Precision of weights and activations: auto, f32 or bf16 (with f32 sums). auto is bf16 on a GPU; on a CPU it is
    /// bf16 if the model is stored in it and the processor multiplies it, and says so
    #[arg(long, value_enum, hide_possible_values = true, default_value_t = DtypeChoice::Auto, global = true)]
    pub(super) dtype: DtypeChoice,
    /// Seed of all random draws
    #[arg(long, value_parser = whole, default_value_t = 0, global = true)]
    pub(super) seed: u64,
    /// Print one JSON object on stdout, and nothing else
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// Mark phases and layers as NVTX ranges, for nsys and ncu: needs libnvtx3interop.so.1 (CUDA toolkit, or the
    /// package nvidia-nvtx)
    #[arg(long, global = true)]
    pub(super) nvtx: bool,
    /// Ask no hub: models and data by name come from the cache alone. HF_HUB_OFFLINE=1 does the same
    #[arg(long, global = true)]
    pub(super) offline: bool,
    /// No progress on stderr
    #[arg(long, global = true)]
    pub(super) quiet: bool,
}

impl Common {
    /// Checks, after all files are read, that the options of reading had an effect; skipped rows go to stderr.
    pub(super) fn end_reading(&self, rows: &RowReader) -> Result<()> {
        rows.check_used()?;
        for SkippedRows { file, rows, first } in rows.skipped().iter().filter(|_| !self.quiet) {
            let first: String = first.iter().map(|error| format!("  {error}\n")).collect();
            say(&format!("{file}: {rows} bad rows left out:\n{first}"));
        }
        Ok(())
    }
}

/// The value of `--device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Device {
    /// The first GPU if it can be used, else the CPU.
    Auto,
    Cpu,
    /// A GPU by its ordinal.
    Cuda(u32),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let ordinal = text.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
                ordinal.map(Self::Cuda).ok_or_else(|| "expected auto, cpu, cuda or cuda:N".into())
            }
        }
    }
}

/// Prints a value as one line of JSON on stdout.
pub(super) fn print_json(value: &impl Serialize) -> Result<()> {
    let value = serde_json::to_value(value).map_err(json::unserializable)?;
    print_line(&value.to_string())
}

/// Writes text to stderr. Where that cannot be written to, the text is lost and nothing else.
pub(super) fn say(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// Prints a line on stdout; a closed pipe ends the process with exit code 0.
pub(super) fn print_line(text: &str) -> Result<()> {
    print_text(format!("{text}\n").as_bytes())
}

/// Prints text on stdout, as [`print_line`].
pub(super) fn print_text(text: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other.map_err(Error::io(std::path::Path::new("stdout"), FileOp::Write)),
    }
}
