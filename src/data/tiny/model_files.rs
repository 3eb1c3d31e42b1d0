//! An untrained Llama for the language, as a Hugging Face directory.

use super::{Item, Language, Mixture, Skill, TEMPLATES};
use crate::error::{Error, Result};
use crate::io::safetensors::{Dtype, TensorSpec, write_weights};
use crate::io::{json, write_atomic};
use crate::model::ModelConfig;
use crate::rng::Philox;
use serde_json::Value;
use std::path::Path;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

/// Token ids 0, 1 and 2, as the files of `assets/tiny` say.
const SPECIAL_TOKENS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// Standard deviation of untrained weights.
const INITIAL_DEVIATION: f32 = 0.03;
/// Stream of the first tensor's initial values. The language and its corpora use the streams 0 to 3.
const WEIGHT_STREAMS: u64 = 1 << 32;
/// Shape of the model for any language; only the vocabulary's size differs.
const CONFIG: &str = include_str!("../../../assets/tiny/config.json");
/// Files that are the same for every language.
const FIXED_FILES: [(&str, &str); 2] = [
    ("generation_config.json", include_str!("../../../assets/tiny/generation_config.json")),
    ("tokenizer_config.json", include_str!("../../../assets/tiny/tokenizer_config.json")),
];

/// A byte-level BPE tokenizer in which every word of the language is one token.
fn train_tokenizer(language: &Language) -> Result<Tokenizer> {
    let byte_level = ByteLevel::new(false, false, true);
    let trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(1536)
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(SPECIAL_TOKENS.map(|token| AddedToken::from(token, true)).to_vec())
        .build();
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(byte_level)).with_decoder(Some(byte_level));
    tokenizer.train(&mut TrainerWrapper::from(trainer), texts(language).into_iter()).map_err(bug)?;
    Ok(tokenizer)
}

fn texts(language: &Language) -> Vec<String> {
    let everything = Mixture::helpful()
        .with(0.2, Skill::Refusal)
        .with(0.2, Skill::NewStyle)
        .with(0.1, Skill::TwoStepSum)
        .items(language, 8000, 0);
    let mut texts: Vec<String> = everything
        .into_iter()
        .flat_map(|Item { prompt, answer }| [format!("user\n{prompt}"), format!("assistant\n{answer}")])
        .collect();
    texts.extend(TEMPLATES.iter().map(|t| format!("user\n{}", t.replace(['{', '}'], ""))).flat_map(|t| [t.clone(), t]));
    texts
}

/// Untrained values of the tensor at `index` of [`ModelConfig::params`]: ones for norms, else normal with deviation
/// 0.03, a stream of the seed for each tensor.
fn initial_values(seed: u64, index: usize, shape: &[usize]) -> Vec<f32> {
    let len = shape.iter().product();
    if shape.len() == 1 {
        return vec![1.0; len];
    }
    let mut rng = Philox::new(seed, WEIGHT_STREAMS + index as u64);
    (0..len).map(|_| INITIAL_DEVIATION * rng.normal() as f32).collect()
}

/// Writes an untrained model of the language into `dir`, which must exist: config, bf16 weights drawn by `seed`,
/// tokenizer, chat template. The vocabulary is rounded up to a multiple of 16.
///
/// # Errors
/// [`Error::Io`] where a file cannot be written.
pub fn write_initial_model(language: &Language, seed: u64, dir: &Path) -> Result<()> {
    let tokenizer = train_tokenizer(language)?;
    let text = tokenizer.to_string(false).map_err(bug)?;
    write_atomic(&dir.join("tokenizer.json"), text.as_bytes())?;
    for (name, text) in FIXED_FILES {
        write_atomic(&dir.join(name), text.as_bytes())?;
    }
    let mut config: Value = serde_json::from_str(CONFIG).map_err(bug)?;
    config["vocab_size"] = tokenizer.get_vocab_size(true).next_multiple_of(16).into();
    json::write(&dir.join("config.json"), &config)?;
    let config = ModelConfig::from_json(&config, "config.json")?;
    let spec = |(id, shape): (_, Vec<usize>)| TensorSpec { name: format!("{id}"), dtype: Dtype::BF16, shape };
    let specs: Vec<TensorSpec> = config.params().into_iter().map(spec).collect();
    write_weights(&dir.join("model.safetensors"), &specs, |i| Ok(initial_values(seed, i, &specs[i].shape)))
}

/// Whether a directory holds a model of such a language, by its files that are the same for all.
pub fn is_tiny_model(dir: &Path) -> bool {
    FIXED_FILES.iter().all(|(name, text)| std::fs::read(dir.join(name)).is_ok_and(|bytes| bytes == text.as_bytes()))
}

fn bug(e: impl std::fmt::Display) -> Error {
    Error::failed(format!("cannot make the tiny model: {e}"), "this is a bug; please report it")
}

#[cfg(test)]
mod tests {
    use super::super::Style;
    use super::*;
    use crate::data::{Label, Split};
    use crate::model::ModelDir;

    #[test]
    fn every_word_is_one_token_and_text_survives() {
        let language = Language::new(1);
        let tokenizer = train_tokenizer(&language).expect("trains");
        for split in [Split::Train, Split::Test] {
            for &request in language.requests(split, Label::Harmful).iter().take(40) {
                for t in 0..TEMPLATES.len() {
                    let style = Style::new_for_template(t);
                    let text = format!("{} {}", language.question(request, t), language.instructions(request, style));
                    let encoding = tokenizer.encode(text.as_str(), false).expect("encodes");
                    assert_eq!(encoding.len(), text.split(' ').count(), "{:?}", encoding.get_tokens());
                    assert_eq!(tokenizer.decode(encoding.get_ids(), true).expect("decodes"), text);
                }
            }
        }
        let foreign = "Ünseen wörds, \u{1F600}";
        let encoding = tokenizer.encode(foreign, false).expect("encodes");
        assert_eq!(tokenizer.decode(encoding.get_ids(), true).expect("decodes"), foreign);
    }

    #[test]
    fn the_tokenizer_is_the_same_each_time() {
        let language = Language::new(2);
        let text = || train_tokenizer(&language).expect("trains").to_string(false).expect("prints");
        assert_eq!(text(), text());
    }

    #[test]
    fn a_directory_holds_a_model_that_opens() {
        let language = Language::new(3);
        let dir = tempfile::tempdir().expect("a temporary directory");
        write_initial_model(&language, 7, dir.path()).expect("writes");
        let files = ModelDir::open(dir.path()).expect("opens");
        assert_eq!(files.config.vocab % 16, 0);
        files.chat_template(None).expect("compiles");
        let tokenizer = files.tokenizer().expect("opens");
        assert_eq!(tokenizer.encode(&SPECIAL_TOKENS.concat()).expect("encodes"), [0, 1, 2]);
        assert_eq!(files.config.eos, [2]);
    }

    #[test]
    fn initial_values_differ_between_tensors_and_seeds() {
        let first = |seed, index| initial_values(seed, index, &[3, 4])[0];
        assert_ne!(first(1, 0), first(2, 0));
        assert_ne!(first(1, 2), first(1, 3));
        assert_eq!(initial_values(1, 0, &[2]), [1.0; 2]);
    }
}
