//! The files of a set of data, by configuration and split in their names, as the library `datasets` reads names.

use super::HubName;
use crate::error::{Error, Result};
use std::collections::BTreeSet;

/// Ends of data files, each also compressed.
const ENDS: [&str; 5] = [".jsonl", ".json", ".csv", ".tsv", ".parquet"];
/// Files of JSON that are no data.
const OTHERS: [&str; 6] =
    ["dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json", "package.json"];
/// Words for the same split.
const SPLITS: [&[&str]; 3] =
    [&["train", "training"], &["validation", "valid", "val", "dev"], &["test", "testing", "eval", "evaluation"]];
/// Most names in an error.
const NAMED: usize = 8;

/// Chooses the files of a set of data: of its configuration, if it has several, and of its split (`train` if not given,
/// or all files where no name has a split).
pub(super) fn choose(name: &HubName, files: &[String]) -> Result<Vec<String>> {
    let files: Vec<&String> = files.iter().filter(|file| is_data(file)).collect();
    let wrong = |found: String, expected: String| Err(Error::input(name.text(), found, expected));
    if files.is_empty() {
        let expected = format!("files that end in {}", ENDS.join(", "));
        return wrong("no data file that swat reads".into(), expected);
    }
    let configs: BTreeSet<&str> = files.iter().filter_map(|file| config_of(file)).collect();
    let files: Vec<&String> = match name.config() {
        Some(config) => {
            let fits =
                |file: &&String| words(file).any(|word| word == config) || file.starts_with(&format!("{config}/"));
            let fits = |file: &&String| fits(file) || config_of(file) == Some(config) || stem_has(file, config);
            files.into_iter().filter(fits).collect()
        }
        None if configs.len() > 1 && files.iter().all(|file| config_of(file).is_some()) => {
            let list: Vec<String> = configs.iter().take(NAMED).map(|c| format!("{}/{c}", name.repo())).collect();
            return wrong("several configurations".into(), format!("one of them: {}", list.join(", ")));
        }
        None => files,
    };
    let splits = |file: &str| words(file).find_map(split_of);
    let wanted = name.split().unwrap_or("train");
    let group = split_of(wanted);
    let fits = |file: &&&String| match (group, shard_of(file)) {
        // `train_sft` is no part of `train`.
        (_, Some(split)) => split == wanted || group.is_some() && split_of(split) == group,
        (Some(group), None) => splits(file) == Some(group),
        (None, None) => words(file).any(|word| word == wanted) || stem_has(file, wanted),
    };
    let chosen: Vec<String> = files.iter().filter(fits).map(|file| (*file).clone()).collect();
    if !chosen.is_empty() {
        return Ok(chosen);
    }
    if group == Some(0) && !files.is_empty() && files.iter().all(|file| splits(file).is_none()) {
        return Ok(files.into_iter().cloned().collect());
    }
    let there: Vec<&str> = files.iter().take(NAMED).map(|file| file.as_str()).collect();
    let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
    wrong(format!("no file of the split `{wanted}`"), format!("a configuration and split of its files: {there}"))
}

/// Chooses the files of a security set: where no split is asked for and some files are named for harmful prompts and
/// some for benign ones, those and no others; else as [`choose`].
pub(super) fn choose_security(name: &HubName, files: &[String]) -> Result<Vec<String>> {
    let named = |label: &str| -> Vec<&String> {
        files.iter().filter(|file| is_data(file) && words(file).any(|word| word.to_lowercase() == label)).collect()
    };
    let (harmful, benign) = (named("harmful"), named("benign"));
    if name.split().is_some() || harmful.is_empty() || benign.is_empty() {
        return choose(name, files);
    }
    Ok(harmful.into_iter().chain(benign).cloned().collect())
}

fn is_data(path: &str) -> bool {
    let file = path.rsplit('/').next().unwrap_or(path);
    let lower = file.to_lowercase();
    let plain = [".gz", ".zst"].iter().find_map(|end| lower.strip_suffix(end)).unwrap_or(&lower);
    !file.starts_with('.') && !OTHERS.contains(&lower.as_str()) && ENDS.iter().any(|end| plain.ends_with(end))
}

/// The folder of a file that names a configuration: the last one that is neither `data` nor a split.
fn config_of(path: &str) -> Option<&str> {
    let (folders, _) = path.rsplit_once('/')?;
    folders.rsplit('/').find(|folder| *folder != "data" && split_of(folder).is_none())
}

/// The split of a shard as `push_to_hub` names it, `train_sft` of `data/train_sft-00000-of-00003.parquet`; none of a name
/// without a word for a split, as in `train/part-00000-of-00003.parquet`.
fn shard_of(path: &str) -> Option<&str> {
    let (before, count) = path.rsplit('/').next()?.rsplit_once("-of-")?;
    let (split, index) = before.rsplit_once('-')?;
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    let names_one = words(split).any(|word| split_of(word).is_some());
    (index.len() == 5 && digits(index) == 5 && digits(count) >= 5 && names_one).then_some(split)
}

/// Index of the split that a word names.
fn split_of(word: &str) -> Option<usize> {
    SPLITS.iter().position(|words| words.contains(&word.to_lowercase().as_str()))
}

/// Words of a path, between dots, dashes, underscores, blanks, digits and slashes.
fn words(path: &str) -> impl Iterator<Item = &str> {
    path.split(|c: char| "/._- ".contains(c) || c.is_ascii_digit()).filter(|word| !word.is_empty())
}

/// Whether a file's name is made of `part` and other words: for parts with digits or dashes, such as `train_sft`.
fn stem_has(path: &str, part: &str) -> bool {
    let bounded = |c: Option<char>| c.is_none_or(|c| "/._- ".contains(c));
    path.match_indices(part)
        .any(|(at, _)| bounded(path[..at].chars().next_back()) && bounded(path[at + part.len()..].chars().next()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(name: &str, files: &[&str]) -> std::result::Result<Vec<String>, String> {
        let files: Vec<String> = files.iter().map(|f| (*f).to_owned()).collect();
        choose(&HubName::data(name).unwrap(), &files).map_err(|e| e.to_string())
    }

    #[test]
    fn harmful_and_benign_files_are_a_security_set() {
        let security = |name: &str, files: &[&str]| {
            let files: Vec<String> = files.iter().map(|f| (*f).to_owned()).collect();
            choose_security(&HubName::data(name).unwrap(), &files).map_err(|e| e.to_string())
        };
        let files =
            ["README.md", "data/benign-behaviors.csv", "data/harmful-behaviors.csv", "data/judge-comparison.csv"];
        let both = ["data/harmful-behaviors.csv", "data/benign-behaviors.csv"].map(str::to_owned).to_vec();
        assert_eq!(security("JailbreakBench/JBB-Behaviors", &files), Ok(both));
        // A set of one file is as any other.
        assert_eq!(security("a/b", &["harmful.csv"]), Ok(vec!["harmful.csv".to_owned()]));
        assert_eq!(
            security("a/b/harmful:test", &["harmful/test.csv", "benign/train.csv"]).unwrap(),
            ["harmful/test.csv"]
        );
    }

    /// Listings of well-known repositories; the choice is that of `load_dataset(name, config, split=split)`.
    #[test]
    fn files_are_chosen_as_datasets_does() {
        let gsm8k = [
            "README.md",
            "main/test-00000-of-00001.parquet",
            "main/train-00000-of-00001.parquet",
            "socratic/test-00000-of-00001.parquet",
            "socratic/train-00000-of-00001.parquet",
        ];
        assert_eq!(chosen("openai/gsm8k/main", &gsm8k).unwrap(), ["main/train-00000-of-00001.parquet"]);
        assert_eq!(chosen("openai/gsm8k/socratic:test", &gsm8k).unwrap(), ["socratic/test-00000-of-00001.parquet"]);
        let error = chosen("openai/gsm8k", &gsm8k).unwrap_err();
        assert!(error.contains("one of them: openai/gsm8k/main, openai/gsm8k/socratic"), "{error}");
        let error = chosen("openai/gsm8k/main:validation", &gsm8k).unwrap_err();
        assert!(error.contains("no file of the split `validation`") && error.contains("main/test-"), "{error}");

        let alpaca = [".gitattributes", "README.md", "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"];
        assert_eq!(
            chosen("tatsu-lab/alpaca", &alpaca).unwrap(),
            ["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"]
        );
        let dolly = ["README.md", "databricks-dolly-15k.jsonl"];
        assert_eq!(chosen("databricks/databricks-dolly-15k", &dolly).unwrap(), ["databricks-dolly-15k.jsonl"]);
        let ultrachat = [
            "data/test_gen-00000-of-00001.parquet",
            "data/test_sft-00000-of-00001.parquet",
            "data/train_gen-00000-of-00002.parquet",
            "data/train_sft-00000-of-00003.parquet",
        ];
        assert_eq!(
            chosen("HuggingFaceH4/ultrachat_200k:train_sft", &ultrachat).unwrap(),
            ["data/train_sft-00000-of-00003.parquet"]
        );
        // Neither of the splits is `train`.
        for name in ["HuggingFaceH4/ultrachat_200k", "HuggingFaceH4/ultrachat_200k:train"] {
            let error = chosen(name, &ultrachat).unwrap_err();
            assert!(error.contains("no file of the split `train`") && error.contains("data/train_sft-"), "{error}");
        }
        let numbered = ["data/330k_train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"];
        assert_eq!(chosen("a/b:330k_train", &numbered).unwrap(), [numbered[0]]);
        assert_eq!(chosen("a/b:valid", &numbered).unwrap(), [numbered[1]]);
        let parts = ["data/test/part-00000-of-00001.parquet", "data/train/part-00000-of-00001.parquet"];
        assert_eq!(chosen("a/b", &parts).unwrap(), [parts[1]]);
        let hh = ["harmless-base/test.jsonl.gz", "harmless-base/train.jsonl.gz", "helpful-base/train.jsonl.gz"];
        assert_eq!(chosen("Anthropic/hh-rlhf/harmless-base", &hh).unwrap(), ["harmless-base/train.jsonl.gz"]);
        assert_eq!(chosen("a/b", &["train.tsv", "test.tsv"]).unwrap(), ["train.tsv"]);
        let dev = ["dev.csv", "train.csv", "dataset_infos.json"];
        assert_eq!(chosen("a/b:validation", &dev).unwrap(), ["dev.csv"]);
        assert_eq!(chosen("a/b", &["state.json", "x.arrow"]).unwrap_err().matches("no data file").count(), 1);
    }
}
