//! `swat completions`, `swat man` and `swat schema`: what a shell, a manual and an editor want to know.

use super::command;
use super::common::{print_line, print_text};
use crate::error::{Error, FileOp, Result};
use crate::io::write_atomic;
use crate::secure::study::RunConfig;
use clap::Args;
use clap_complete::Shell;
use std::path::PathBuf;

/// Completions for a shell, on stdout
#[derive(Args)]
#[command(after_help = "Examples:
  swat completions bash > ~/.local/share/bash-completion/completions/swat
  swat completions zsh > ~/.zfunc/_swat                    with `fpath+=~/.zfunc` before compinit
  swat completions fish > ~/.config/fish/completions/swat.fish")]
pub(super) struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self) -> Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut command(), "swat", &mut script);
        print_text(&script)
    }
}

/// Manual pages, one per command
#[derive(Args)]
#[command(after_help = "Example:
  swat man ~/.local/share/man/man1 && man swat-tune")]
pub(super) struct Man {
    /// Directory that the pages swat.1, swat-tune.1 and so on are written to
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

impl Man {
    pub(super) fn run(self) -> Result<()> {
        std::fs::create_dir_all(&self.dir).map_err(Error::io(&self.dir, FileOp::Create))?;
        let mut whole = command().disable_help_subcommand(true);
        whole.build();
        let own = whole.get_subcommands().cloned().map(|page| {
            let name = format!("swat-{}", page.get_name());
            page.display_name(name)
        });
        for page in std::iter::once(whole.clone()).chain(own) {
            let page = clap_mangen::Man::new(page);
            let mut text = Vec::new();
            let path = self.dir.join(page.get_filename());
            page.render(&mut text).map_err(Error::io(&path, FileOp::Write))?;
            write_atomic(&path, &text)?;
        }
        print_line(&format!("manual pages are in {}", self.dir.display()))
    }
}

/// JSON schema of the configuration of `swat run`, on stdout
#[derive(Args)]
#[command(after_help = "Example:
  swat schema > swat.schema.json

In an editor with a TOML language server, such as taplo or Even Better TOML, begin the configuration with
  #:schema ./swat.schema.json
and it completes keys and marks what is wrong.")]
pub(super) struct Schema {}

impl Schema {
    pub(super) fn run(self) -> Result<()> {
        let schema = schemars::schema_for!(RunConfig);
        print_line(&serde_json::to_string_pretty(&schema).map_err(crate::io::json::unserializable)?)
    }
}
