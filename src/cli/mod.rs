//! The command line: one file a command. Parses, calls, prints; no logic.

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

use crate::error::{Error, Result};
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
    /// Where to compute: auto, cpu, cuda or cuda:N. auto takes a GPU that works and says which
    #[arg(long, default_value = "auto", global = true)]
    device: String,
    /// Seed of everything that is drawn
    #[arg(long, default_value_t = 0, global = true)]
    seed: u64,
    /// Print one JSON object on stdout and nothing else there
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
    // Inside the pool from the start: an operation then does not have to hand its work over and wait.
    let result = rayon::scope(|_| match cli.command {
        Command::Demo(c) => c.start(),
        Command::Probe(c) => c.start(),
        Command::Drift(c) => c.start(),
        Command::Robustness(c) => c.start(),
        Command::Search(c) => c.start(),
        Command::Tune(c) => {
            let state = c.state;
            c.start_training(state)
        }
        Command::Eval(c) => c.start(),
        Command::Run(c) => {
            let state = c.state;
            c.start_training(state)
        }
        Command::Generate(c) => c.start(),
        Command::Score(c) => c.start(),
        Command::Plan(c) => c.run(),
        Command::Profile(c) => {
            let state = c.state;
            c.start_training(state)
        }
        Command::Doctor(c) => c.run(),
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
        other => other.map_err(Error::io(std::path::Path::new("stdout"), "write")),
    }
}
