//! Commands and configurations in the documentation and in `--help` are such as the program takes.

use super::{command, effect};
use crate::secure::study::RunConfig;
use clap::error::ErrorKind;
use std::path::Path;

/// README and its like, and the pages below docs, by their paths.
fn pages() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut pages = Vec::new();
    for folder in [root.to_owned(), root.join("docs"), root.join("docs/results")] {
        let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
        for file in files.filter(|file| file.extension().is_some_and(|kind| kind == "md")) {
            pages.push((file.display().to_string(), std::fs::read_to_string(file).unwrap()));
        }
    }
    pages
}

/// A fenced block: its language, the line before it, and its text.
struct Block<'t> {
    language: &'t str,
    line: usize,
    text: String,
}

/// Fenced blocks of a page, and the page without them.
fn blocks(page: &str) -> (Vec<Block<'_>>, String) {
    let (mut blocks, mut rest, mut open): (Vec<Block<'_>>, String, bool) = (Vec::new(), String::new(), false);
    for (i, line) in page.lines().enumerate() {
        match (line.trim_start().strip_prefix("```"), open) {
            (Some(language), false) => blocks.push(Block { language, line: i + 1, text: String::new() }),
            (Some(_), true) => {}
            (None, true) => blocks.iter_mut().last().unwrap().text += &format!("{line}\n"),
            (None, false) => rest += &format!("{line}\n"),
        }
        open ^= line.trim_start().starts_with("```");
    }
    (blocks, rest)
}

/// Arguments of the `swat` commands in a line of a shell.
fn commands(line: &str) -> Vec<Vec<String>> {
    let words = shlex::split(line).unwrap_or_else(|| panic!("quotes: {line}"));
    let apart = |word: &String| match word.strip_suffix(';') {
        Some(word) => vec![word.to_owned(), ";".to_owned()],
        None => vec![word.clone()],
    };
    let words: Vec<String> = words.iter().flat_map(apart).collect();
    let parts = words.split(|word| ["|", "||", "&", "&&", ";", ">"].contains(&word.as_str()));
    let arguments = |part: &[String]| {
        let before = |i: usize| i.checked_sub(1).and_then(|i| part.get(i)).map_or("", String::as_str);
        let is_swat = |i: &usize| part[*i] == "swat" || part[*i].ends_with("/swat") && before(*i) != "--swat";
        let by_cargo = || part.iter().position(|word| word == "--").filter(|_| before(2) == "run");
        let start = (0..part.len()).find(is_swat).or_else(by_cargo)?;
        Some(part[start + 1..].iter().map(|word| without_variables(word)).collect::<Vec<_>>())
    };
    parts.filter_map(arguments).filter(|words| !words.is_empty()).collect()
}

/// A word with 0 in the place of each variable of the shell.
fn without_variables(word: &str) -> String {
    let mut parts = word.split('$');
    let first = parts.next().unwrap_or_default().to_owned();
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    parts.fold(first, |text, part| text + "0" + part.trim_start_matches(is_name))
}

/// Whether the program takes these arguments; an ellipsis stands for those that are required.
fn check(words: &[String]) -> Result<(), String> {
    let elided = words.iter().any(|word| word == "..." || word == "…");
    let words = words.iter().map(String::as_str).filter(|word| *word != "..." && *word != "…");
    match command().try_get_matches_from(std::iter::once("swat").chain(words)) {
        Err(e) if elided && e.kind() == ErrorKind::MissingRequiredArgument => Ok(()),
        Err(e) if [ErrorKind::DisplayHelp, ErrorKind::DisplayVersion].contains(&e.kind()) => Ok(()),
        Err(e) => Err(e.to_string()),
        Ok(_) if elided => Ok(()),
        Ok(matches) => {
            let (name, matches) = matches.subcommand().ok_or("no command")?;
            effect::check(name, matches).map_err(|e| e.to_string())
        }
    }
}

/// Whether command and options of code within a text exist; of several commands, `a|b`, each.
fn check_mention(code: &str, grammar: &clap::Command) -> Result<(), String> {
    let mut words = code.split_whitespace().skip(1);
    let names = words.next().unwrap_or_default();
    let options: Vec<&str> = words.filter_map(|word| word.strip_prefix("--")).collect();
    for name in names.split('|').filter(|name| !name.starts_with('-')) {
        let found = grammar.find_subcommand(name).ok_or_else(|| format!("no command {name}"))?;
        for option in &options {
            let long = option.split(|c: char| !c.is_ascii_lowercase() && c != '-').next();
            if !found.get_arguments().any(|arg| arg.get_long() == long) {
                return Err(format!("swat {name} has no --{option}"));
            }
        }
    }
    Ok(())
}

#[test]
fn commands_in_the_documentation_are_taken() {
    let mut grammar = command();
    grammar.build();
    let (mut wrong, mut count) = (Vec::new(), 0);
    for (path, page) in pages() {
        let (blocks, text) = blocks(&page);
        for Block { language, line, text } in blocks {
            if language == "toml"
                && let Err(e) = toml::from_str::<RunConfig>(&text)
            {
                wrong.push(format!("{path}:{line}: {e}"));
            }
            let lines = text.replace("\\\n", " ");
            let lines = lines.lines().filter(|_| ["bash", "yaml"].contains(&language));
            for words in lines.filter(|line| line.contains("swat")).flat_map(commands) {
                count += 1;
                wrong.extend(check(&words).err().map(|e| format!("{path}:{line}: {}\n{e}", words.join(" "))));
            }
        }
        let code = text.split('`').skip(1).step_by(2).filter(|code| code.starts_with("swat "));
        for code in code {
            count += 1;
            wrong.extend(check_mention(code, &grammar).err().map(|e| format!("{path}: `{code}`: {e}")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(count > 150, "only {count} commands were found");
}

#[test]
fn examples_of_help_are_taken() {
    let mut count = 0;
    for command in command().get_subcommands() {
        let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        // What an example does stands behind it, apart.
        let examples = text.lines().filter_map(|line| line.strip_prefix("  ")?.split("   ").next());
        for words in examples.filter(|line| line.contains("swat ")).flat_map(commands) {
            count += 1;
            check(&words).unwrap_or_else(|e| panic!("{}: {}\n{e}", command.get_name(), words.join(" ")));
        }
    }
    assert!(count > 40, "only {count} examples were found");
}

#[test]
fn what_the_program_does_not_take_is_found() {
    let first = |line: &str| commands(line).swap_remove(0);
    for (line, found) in [
        ("swat tune --model m --data d --out o --no-such 1", Err("--no-such")),
        ("swat tun --model m", Err("tun")),
        ("swat tune --model m --data d --out o --lora-rank 4", Err("no effect without --method lora")),
        ("swat check --model m --against b", Err("--security")),
        ("srun -n 8 swat tune … --no-such", Err("--no-such")),
        ("code=0; swat check … --against b || code=$?", Ok(())),
        ("cargo run --release -- demo --seeds 2   # in a minute", Ok(())),
        ("$B/swat robustness ... --shard-index \"$INDEX\" --shard-count 8 & done", Ok(())),
        ("swat run study.toml --list-jobs | xargs -n 1 sh -c", Ok(())),
    ] {
        match (check(&first(line)), found) {
            (Ok(()), Ok(())) => {}
            (Err(e), Err(found)) => assert!(e.contains(found), "{line}: {e}"),
            (result, _) => panic!("{line}: {result:?}"),
        }
    }
    assert!(commands("python compare.py --swat target/release/swat --model m").is_empty());
    assert!(commands("swat man here > ~/completions/swat").len() == 1);
    let mut grammar = command();
    grammar.build();
    assert!(check_mention("swat eval|check --judge-model DIR --seed", &grammar).is_ok());
    assert!(check_mention("swat eval --judge-modell", &grammar).is_err());
    assert!(check_mention("swat evil", &grammar).is_err());
}
