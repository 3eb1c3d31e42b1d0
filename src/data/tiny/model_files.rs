//! An untrained Llama for the language, as a Hugging Face directory.

use super::{Item, Language, Mixture, Skill, TEMPLATES};
use crate::data::Draw;
use crate::error::{Error, Result};
use crate::model::{ModelConfig, Rope, RopeScaling};
use crate::modules::ParamId;
use std::path::Path;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

const END_OF_TEXT: &str = "<|endoftext|>";
const TURN_START: &str = "<|im_start|>";
const TURN_END: &str = "<|im_end|>";
const END_OF_TEXT_ID: u32 = 0;
const TURN_END_ID: u32 = 2;
const MAX_POSITIONS: usize = 256;
const INITIAL_DEVIATION: f32 = 0.03;
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// A byte-level BPE tokenizer whose vocabulary holds every word of the language as one token.
///
/// # Errors
/// [`Error::Failed`] where the trainer fails, which would be a bug.
pub fn train_tokenizer(language: &Language) -> Result<Tokenizer> {
    let failed = |e: tokenizers::Error| Error::failed(format!("cannot train the tokenizer: {e}"), "please report it");
    let byte_level = ByteLevel::new(false, false, true);
    let special = |text: &str| AddedToken::from(text, true);
    let trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(1536)
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![special(END_OF_TEXT), special(TURN_START), special(TURN_END)])
        .build();
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(byte_level)).with_decoder(Some(byte_level));
    tokenizer.train(&mut TrainerWrapper::from(trainer), texts(language).into_iter()).map_err(failed)?;
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

/// The shape for a vocabulary of `tokens` entries, which is rounded up to a multiple of 16.
pub fn config(tokens: usize) -> ModelConfig {
    let layers = 6;
    ModelConfig {
        family: "llama".into(),
        vocab: tokens.next_multiple_of(16),
        hidden: 96,
        ffn: 256,
        layers,
        heads: 3,
        kv_heads: 1,
        head_dim: 32,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        max_positions: MAX_POSITIONS,
        tied: true,
        biases: Vec::new(),
        qk_norm: false,
        windows: vec![None; layers],
        bos: None,
        eos: vec![TURN_END_ID],
    }
}

/// Untrained values of a tensor: ones for norms, else normal with deviation 0.03, a stream of the seed for each tensor.
pub fn initial_tensor(config: &ModelConfig, seed: u64, id: ParamId, shape: &[usize]) -> Vec<f32> {
    let len = shape.iter().product();
    if shape.len() == 1 {
        return vec![1.0; len];
    }
    let index = config.params().iter().position(|(other, _)| *other == id).unwrap_or_default();
    let mut draw = Draw::stream(seed, index as u64);
    (0..len).map(|_| INITIAL_DEVIATION * draw.normal()).collect()
}

/// Writes an untrained model of the language into `dir`, which must exist: config, bf16 weights by `seed`, tokenizer,
/// chat template.
///
/// # Errors
/// [`Error::Io`] where a file cannot be written.
pub fn write_initial_model(language: &Language, seed: u64, dir: &Path) -> Result<()> {
    let tokenizer = train_tokenizer(language)?;
    let config = config(tokenizer.get_vocab_size(true));
    write(dir, "config.json", pretty(&config_json(&config)).as_bytes())?;
    write(
        dir,
        "generation_config.json",
        pretty(&serde_json::json!({"eos_token_id": TURN_END_ID, "pad_token_id": END_OF_TEXT_ID})).as_bytes(),
    )?;
    write(dir, "tokenizer_config.json", pretty(&tokenizer_config_json()).as_bytes())?;
    let text = tokenizer
        .to_string(false)
        .map_err(|e| Error::failed(format!("cannot write the tokenizer: {e}"), "please report it"))?;
    write(dir, "tokenizer.json", text.as_bytes())?;
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = config
        .params()
        .into_iter()
        .map(|(id, shape)| {
            let values = initial_tensor(&config, seed, id, &shape);
            let bytes = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
            (id.to_string(), shape, bytes)
        })
        .collect();
    let failed = |e: safetensors::SafeTensorError| Error::failed(format!("model.safetensors: {e}"), "please report it");
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| {
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes);
            view.map(|view| (name.as_str(), view))
        })
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    let metadata = std::collections::HashMap::from([("format".to_owned(), "pt".to_owned())]);
    write(dir, "model.safetensors", &safetensors::serialize(views, Some(metadata)).map_err(failed)?)
}

fn config_json(config: &ModelConfig) -> serde_json::Value {
    serde_json::json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": false,
        "mlp_bias": false,
        "rms_norm_eps": 1e-5,
        "rope_theta": config.rope.theta,
        "rope_scaling": null,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tied,
        "initializer_range": 0.03,
        "bos_token_id": null,
        "eos_token_id": TURN_END_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "torch_dtype": "bfloat16",
        "use_cache": true,
    })
}

fn tokenizer_config_json() -> serde_json::Value {
    serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_POSITIONS,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": false,
        "chat_template": CHAT_TEMPLATE,
    })
}

fn pretty(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = dir.join(name);
    std::fs::write(&path, bytes).map_err(Error::io(&path, "write"))
}

#[cfg(test)]
mod tests {
    use super::super::Style;
    use super::*;
    use crate::data::Split;

    #[test]
    fn every_word_is_one_token_and_text_survives() {
        let language = Language::new(1);
        let tokenizer = train_tokenizer(&language).expect("trains");
        for split in [Split::Train, Split::Test] {
            for &request in language.requests(split, true).iter().take(40) {
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
    fn a_directory_holds_every_tensor_of_the_config() {
        let language = Language::new(3);
        let dir = tempfile::tempdir().expect("a temporary directory");
        write_initial_model(&language, 7, dir.path()).expect("writes");
        let bytes = std::fs::read(dir.path().join("model.safetensors")).expect("reads");
        let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("parses");
        let config = config(train_tokenizer(&language).expect("trains").get_vocab_size(true));
        assert_eq!(tensors.len(), config.params().len());
        for (id, shape) in config.params() {
            assert_eq!(tensors.tensor(&id.to_string()).expect("is there").shape(), shape, "{id}");
        }
        let special = tokenizers::Tokenizer::from_file(dir.path().join("tokenizer.json")).expect("opens");
        assert_eq!(special.token_to_id(TURN_END), Some(TURN_END_ID));
        assert_eq!(special.token_to_id(END_OF_TEXT), Some(END_OF_TEXT_ID));
    }

    #[test]
    fn initial_values_differ_between_tensors_and_seeds() {
        let config = config(900);
        let params = config.params();
        let first = |seed, index: usize| initial_tensor(&config, seed, params[index].0, &params[index].1)[0];
        assert_ne!(first(1, 0), first(2, 0));
        assert_ne!(first(1, 2), first(1, 3));
        assert_eq!(first(1, 1), 1.0);
    }
}
