//! The command line, one file per command: parsing and printing, no logic.

mod demo;
mod doctor;
mod drift;
mod eval;
mod generate;
mod open;
mod plan;
mod probe;
mod profile;
mod progress;
mod robustness;
mod run;
mod score;
mod search;
mod tune;

use crate::error::{Error, FileOp, Result};
use clap::{Args, Parser, Subcommand};
use open::OnDevice;
use std::process::ExitCode;

/// Secure tuning of large language models (SWAT): find the modules whose change moves a model's security features
/// least, warm those up first, then tune everything.
#[derive(Parser)]
#[command(
    name = "swat",
    version,
    about,
    after_help = "Start with `swat demo`: the whole method in minutes, nothing to download."
)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Demo),
    Probe(probe::ProbeCommand),
    Drift(drift::DriftCommand),
    Robustness(robustness::RobustnessCommand),
    Search(search::SearchCommand),
    Tune(Box<tune::Tune>),
    Eval(eval::EvalCommand),
    Run(run::RunCommand),
    Generate(generate::Generate),
    Score(score::Score),
    Plan(plan::PlanCommand),
    Profile(profile::ProfileCommand),
    Doctor(doctor::Doctor),
}

/// Options of every command.
#[derive(Args, Clone, Debug)]
struct Common {
    /// Device: auto, cpu, cuda or cuda:N. auto uses a working GPU, and says which
    #[arg(long, default_value = "auto", global = true)]
    device: String,
    /// Seed of all random draws
    #[arg(long, default_value_t = 0, global = true)]
    seed: u64,
    /// Print one JSON object on stdout, and nothing else
    #[arg(long, global = true)]
    json: bool,
    /// Mark phases and layers as NVTX ranges, for nsys and ncu: needs libnvtx3interop.so.1 (CUDA toolkit, or the package
    /// nvidia-nvtx)
    #[arg(long, global = true)]
    nvtx: bool,
    /// No progress on stderr
    #[arg(long, global = true)]
    quiet: bool,
}

/// Runs the command line and returns the process's exit code: 0 done, 1 failed while running, 2 wrong input.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(e.exit_code() as u8);
        }
    };
    let common = &cli.common;
    // Inside the thread pool from the start: otherwise every operation hands its work over and waits.
    let result = rayon::scope(|_| match cli.command {
        Command::Demo(c) => c.start(common),
        Command::Probe(c) => c.start(common),
        Command::Drift(c) => c.start(common),
        Command::Robustness(c) => c.start(common),
        Command::Search(c) => c.start(common),
        Command::Tune(c) => c.start(common),
        Command::Eval(c) => c.start(common),
        Command::Run(c) => c.start(common),
        Command::Generate(c) => c.start(common),
        Command::Score(c) => c.start(common),
        Command::Plan(c) => c.run(common),
        Command::Profile(c) => c.start(common),
        Command::Doctor(c) => c.run(common),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::from(e.exit_code())
        }
    }
}

/// Prints one JSON value on a line of stdout.
fn print_json(value: &serde_json::Value) -> Result<()> {
    print_line(&value.to_string())
}

/// Prints a line on stdout; a closed pipe ends the program quietly.
fn print_line(text: &str) -> Result<()> {
    use std::io::Write;
    match writeln!(std::io::stdout().lock(), "{text}") {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other.map_err(Error::io(std::path::Path::new("stdout"), FileOp::Write)),
    }
}
