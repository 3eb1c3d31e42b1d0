//! The command line, one file per command: parsing and printing, no logic.

mod answers;
mod check;
mod common;
mod demo;
#[cfg(test)]
mod docs;
mod doctor;
mod drift;
mod effect;
mod eval;
mod generate;
mod headings;
mod merge;
mod method;
mod names;
mod open;
mod plan;
mod preview;
mod probe;
mod profile;
mod progress;
mod ranks;
mod recipe;
mod replay;
mod robustness;
mod run;
mod score;
mod screen;
mod search;
mod secure;
mod shard;
mod shell;
mod tune;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use common::{Common, say};
use open::OnDevice;
use std::process::ExitCode;

/// Secure tuning of large language models (SWAT): find the modules whose perturbation affects a model's security
/// features least, tune those first, then everything.
#[derive(Parser)]
#[command(
    name = "swat",
    version = concat!(env!("CARGO_PKG_VERSION"), env!("SWAT_COMMIT")),
    about,
    after_help = "Start with `swat demo`: the whole method in a minute on two cores, nothing to download."
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
    Secure(Box<secure::SecureCommand>),
    Tune(Box<tune::Tune>),
    Replay(replay::ReplayCommand),
    Screen(screen::ScreenCommand),
    Merge(Box<merge::MergeCommand>),
    Eval(eval::EvalCommand),
    Check(check::CheckCommand),
    Run(run::RunCommand),
    Generate(generate::Generate),
    Score(score::Score),
    Plan(plan::PlanCommand),
    Profile(profile::ProfileCommand),
    Doctor(doctor::Doctor),
    Completions(shell::Completions),
    Man(shell::Man),
    Schema(shell::Schema),
}

/// The command line's grammar.
fn command() -> clap::Command {
    // Given here, once, for every option of every command: `--lr -1` is a wrong value and no unknown option.
    let ready = |arg: clap::Arg| {
        let arg = if arg.get_action().takes_values() { arg.allow_negative_numbers(true) } else { arg };
        headings::put(arg)
    };
    let of_command = |command: clap::Command| {
        let name = command.get_name().to_owned();
        let footer = command.get_after_help().map(|footer| headings::joined(&footer.to_string()));
        let command = command.mut_args(|arg| {
            let refused = effect::is_refused(&name, arg.get_id().as_str());
            ready(arg).hide(refused)
        });
        footer.into_iter().fold(command, clap::Command::after_help)
    };
    Cli::command().mut_subcommands(of_command).mut_args(ready)
}

/// Runs the command line and returns the process's exit code: 0 done, 1 failed while running, 2 wrong input, 3
/// not held (`swat check`, `swat secure`, `swat merge --alpha auto`).
pub fn main() -> ExitCode {
    let parsed = command().try_get_matches().and_then(|matches| Ok((Cli::from_arg_matches(&matches)?, matches)));
    let (cli, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(e.exit_code() as u8);
        }
    };
    if let Some((name, matches)) = matches.subcommand()
        && let Err(e) = effect::check(name, matches)
    {
        say(&format!("error: {e}\n"));
        return ExitCode::from(e.exit_code());
    }
    let common = &cli.common;
    let processes = match cli.command {
        Command::Tune(_) => ranks::local_ranks(),
        Command::Robustness(_) | Command::Run(_) => ranks::parts(),
        _ => 1,
    };
    if let Some(threads) = ranks::threads(processes) {
        // It is built nowhere before.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    }
    // Inside the thread pool from the start: otherwise every operation hands its work over and waits.
    let result = rayon::scope(|_| match cli.command {
        Command::Demo(c) => c.start(common),
        Command::Probe(c) => c.start(common),
        Command::Drift(c) => c.start(common),
        Command::Robustness(c) => c.start(common),
        Command::Search(c) => c.start(common),
        Command::Secure(c) => ranks::refuse_ranks("secure", "`swat tune`").and_then(|()| c.start(common)),
        Command::Tune(c) => c.start(common),
        Command::Replay(c) => c.start(common),
        Command::Screen(c) => c.start(common),
        Command::Merge(c) => c.execute(common),
        Command::Eval(c) => c.start(common),
        Command::Check(c) => c.start(common),
        Command::Run(c) => c.start(common),
        Command::Generate(c) => c.start(common),
        Command::Score(c) => c.start(common),
        Command::Plan(c) => c.run(common),
        Command::Profile(c) => c.start(common),
        Command::Doctor(c) => c.run(common),
        Command::Completions(c) => c.run(),
        Command::Man(c) => c.run(),
        Command::Schema(c) => c.run(),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            say(&format!("error: {e}\n"));
            ExitCode::from(e.exit_code())
        }
    }
}
