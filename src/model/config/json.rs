//! Reads `config.json` as written by transformers 4 and 5.

use super::fields::{Fields, describe};
use super::{ModelConfig, Rope, RopeScaling};
use crate::error::{Error, Result};
use crate::modules::ModuleKind;
use serde_json::Value;

const FAMILIES: [(&str, &str); 4] = [
    ("llama", "LlamaForCausalLM"),
    ("mistral", "MistralForCausalLM"),
    ("qwen2", "Qwen2ForCausalLM"),
    ("qwen3", "Qwen3ForCausalLM"),
];
const FAMILIES_HELP: &str = "use a dense Llama, Mistral, Qwen2 or Qwen3 causal language model";

// Above every model of these families by an order of magnitude, and small enough that no product of two overflows.
const MAX_VOCAB: usize = 1 << 24;
const MAX_HIDDEN: usize = 1 << 18;
const MAX_FFN: usize = 1 << 20;
const MAX_LAYERS: usize = 1000;
const MAX_HEADS: usize = 1 << 12;
const MAX_HEAD_DIM: usize = 1 << 10;
const MAX_POSITIONS: usize = 1 << 28;

impl ModelConfig {
    /// Parses the `config.json` of Llama 1 to 3, Mistral, Qwen2 or Qwen3, as written by transformers 4 (`rope_theta`,
    /// `rope_scaling`) or 5 (`rope_parameters`, `layer_types`). `place` is the file shown in errors. Absent fields take
    /// the defaults of transformers' configuration classes.
    ///
    /// # Errors
    /// [`Error::Input`] for a field that is missing, ill-typed or out of range; [`Error::Unsupported`] for another
    /// architecture, a mixture of experts, quantised weights, another activation, or another kind of rope.
    pub fn from_json(value: &Value, place: &str) -> Result<Self> {
        let fields = Fields::new(value, place)?;
        let family = family(&fields)?;
        refuse_unsupported(&fields)?;

        let vocab = fields.required_size("vocab_size", MAX_VOCAB)?;
        let hidden = fields.required_size("hidden_size", MAX_HIDDEN)?;
        let layers = fields.required_size("num_hidden_layers", MAX_LAYERS)?;
        let heads = fields.required_size("num_attention_heads", MAX_HEADS)?;
        let kv_heads = kv_heads(&fields, family, heads)?;
        let head_dim = head_dim(&fields, family, hidden, heads)?;
        let max_positions = fields.required_size("max_position_embeddings", MAX_POSITIONS)?;
        let rms_norm_eps = fields.number("rms_norm_eps", |x| x > 0.0 && x < 1.0, "a number between 0 and 1")?;

        let bos = fields.tokens("bos_token_id", vocab)?;
        Ok(Self {
            family: family.to_owned(),
            vocab,
            hidden,
            ffn: fields.required_size("intermediate_size", MAX_FFN)?,
            layers,
            heads,
            kv_heads,
            head_dim,
            rms_norm_eps: rms_norm_eps.unwrap_or(1e-6) as f32,
            rope: rope(&fields, head_dim, max_positions)?,
            max_positions,
            tied: fields.flag("tie_word_embeddings", false)?,
            biases: biases(&fields, family)?,
            qk_norm: family == "qwen3",
            windows: windows(&fields, family, layers)?,
            bos: bos.first().copied(),
            eos: fields.tokens("eos_token_id", vocab)?,
        })
    }

    /// Adds the end-of-turn tokens of a `generation_config.json`.
    ///
    /// # Errors
    /// [`Error::Input`] where `eos_token_id` is not a token id of the vocabulary.
    pub fn add_generation_config(&mut self, value: &Value, place: &str) -> Result<()> {
        for token in Fields::new(value, place)?.tokens("eos_token_id", self.vocab)? {
            if !self.eos.contains(&token) {
                self.eos.push(token);
            }
        }
        Ok(())
    }
}

fn family(fields: &Fields<'_>) -> Result<&'static str> {
    let expected = "llama, mistral, qwen2 or qwen3";
    let model_type = fields.text("model_type")?.ok_or_else(|| fields.wrong("model_type", expected))?;
    let Some((family, class)) = FAMILIES.into_iter().find(|(family, _)| *family == model_type) else {
        let what = format!("the model type `{}`", model_type.escape_debug());
        return Err(fields.unsupported("model_type", what, FAMILIES_HELP));
    };
    match fields.get("architectures") {
        None => {}
        Some(Value::Array(list)) => {
            for architecture in list {
                let known = architecture.as_str().is_some_and(|name| name.eq_ignore_ascii_case(class));
                if !known {
                    let what = format!("the architecture {} of a `{family}` model", describe(architecture));
                    return Err(fields.unsupported("architectures", what, FAMILIES_HELP));
                }
            }
        }
        Some(_) => return Err(fields.wrong("architectures", "a list of names")),
    }
    Ok(family)
}

fn refuse_unsupported(fields: &Fields<'_>) -> Result<()> {
    // The last is MLX's.
    for key in ["quantization_config", "compression_config", "quantization"] {
        if fields.get(key).is_some() {
            let help = "use the model in bf16, f16 or f32 as it was before quantisation";
            return Err(fields.unsupported(key, "a quantised model", help));
        }
    }
    for key in ["num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"] {
        if fields.get(key).is_some() {
            return Err(fields.unsupported(key, "a mixture of experts", FAMILIES_HELP));
        }
    }
    match fields.text("hidden_act")? {
        None | Some("silu" | "swish") => Ok(()),
        Some(other) => {
            let what = format!("the activation `{}`", other.escape_debug());
            Err(fields.unsupported("hidden_act", what, "use a model whose MLP is SwiGLU (silu)"))
        }
    }
}

fn kv_heads(fields: &Fields<'_>, family: &str, heads: usize) -> Result<usize> {
    let kv_heads = match fields.size("num_key_value_heads", heads)? {
        Some(kv_heads) => kv_heads,
        // Llama 1 predates the field; `null` means "as many as heads" everywhere.
        None if family == "llama" || fields.mentions("num_key_value_heads") => heads,
        None => return Err(fields.wrong("num_key_value_heads", format!("a whole number from 1 to {heads}"))),
    };
    if !heads.is_multiple_of(kv_heads) {
        return Err(fields.wrong("num_key_value_heads", format!("a divisor of num_attention_heads ({heads})")));
    }
    Ok(kv_heads)
}

fn head_dim(fields: &Fields<'_>, family: &str, hidden: usize, heads: usize) -> Result<usize> {
    let head_dim = match fields.size("head_dim", MAX_HEAD_DIM)? {
        Some(head_dim) => head_dim,
        None if family == "qwen3" && !fields.mentions("head_dim") => 128,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(fields.wrong(
                "num_attention_heads",
                format!("a divisor of hidden_size ({hidden}), or a config that gives head_dim"),
            ));
        }
    };
    if !head_dim.is_multiple_of(2) || head_dim > MAX_HEAD_DIM {
        return Err(Error::input(
            fields.place("head_dim"),
            head_dim.to_string(),
            format!("an even number up to {MAX_HEAD_DIM}: rotary embeddings turn pairs"),
        ));
    }
    Ok(head_dim)
}

fn biases(fields: &Fields<'_>, family: &str) -> Result<Vec<ModuleKind>> {
    use ModuleKind::{Down, Gate, K, O, Q, Up, V};
    let mut biases = match family {
        "qwen2" => vec![Q, K, V],
        "llama" | "qwen3" if fields.flag("attention_bias", false)? => vec![Q, K, V, O],
        _ => Vec::new(),
    };
    if family == "llama" && fields.flag("mlp_bias", false)? {
        biases.extend([Gate, Up, Down]);
    }
    Ok(biases)
}

/// Attention window of each layer.
fn windows(fields: &Fields<'_>, family: &str, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = match fields.size("sliding_window", MAX_POSITIONS)? {
        None if !fields.mentions("sliding_window") => Some(4096),
        window => window,
    };
    match family {
        "mistral" => {
            // transformers gives every layer of a Mistral the window, whatever `layer_types` says.
            if layer_types(fields, layers)?.is_some_and(|types| types.iter().any(|t| *t != window.is_some())) {
                let what = "a Mistral that mixes full and sliding attention";
                return Err(fields.unsupported("layer_types", what, FAMILIES_HELP));
            }
            Ok(vec![window; layers])
        }
        "qwen2" | "qwen3" => {
            let window = window.filter(|_| fields.get("use_sliding_window") == Some(&Value::Bool(true)));
            fields.flag("use_sliding_window", false)?;
            match layer_types(fields, layers)? {
                Some(types) if window.is_none() && types.contains(&true) => {
                    Err(fields.wrong("layer_types", "full_attention: sliding_window is not in use"))
                }
                Some(types) => Ok(types.iter().map(|sliding| window.filter(|_| *sliding)).collect()),
                None => {
                    let full = max_window_layers(fields)?;
                    Ok((0..layers).map(|layer| window.filter(|_| layer as u64 >= full)).collect())
                }
            }
        }
        _ => Ok(vec![None; layers]),
    }
}

/// The first layer with a sliding window.
fn max_window_layers(fields: &Fields<'_>) -> Result<u64> {
    match fields.get("max_window_layers") {
        None => Ok(28),
        Some(value) => value.as_u64().ok_or_else(|| fields.wrong("max_window_layers", "a whole number")),
    }
}

/// Whether each layer has a sliding window, where `layer_types` is given.
fn layer_types(fields: &Fields<'_>, layers: usize) -> Result<Option<Vec<bool>>> {
    let list = match fields.get("layer_types") {
        None => return Ok(None),
        Some(Value::Array(list)) if list.len() == layers => list,
        Some(_) => return Err(fields.wrong("layer_types", format!("a list of num_hidden_layers ({layers}) names"))),
    };
    let sliding = |value: &Value| match value.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        _ => {
            let what = format!("the layer type {}", describe(value));
            Err(fields.unsupported("layer_types", what, "use full_attention or sliding_attention"))
        }
    };
    list.iter().map(sliding).collect::<Result<_>>().map(Some)
}

fn rope(fields: &Fields<'_>, head_dim: usize, max_positions: usize) -> Result<Rope> {
    // As transformers 5 does: an old `rope_scaling` wins over `rope_parameters`.
    let scaling = match fields.object("rope_scaling")? {
        Some(scaling) => Some(scaling),
        None => fields.object("rope_parameters")?,
    };
    let positive = |fields: &Fields<'_>, key: &str| fields.number(key, |x| x > 0.0, "a number above 0");
    let outer_theta = positive(fields, "rope_theta")?;
    let inner_theta = scaling.as_ref().map(|s| positive(s, "rope_theta")).transpose()?.flatten();
    let theta = inner_theta.or(outer_theta).unwrap_or(10_000.0);
    for part in [Some(fields), scaling.as_ref()].into_iter().flatten() {
        let share = part.number("partial_rotary_factor", |x| x > 0.0 && x <= 1.0, "a number above 0, up to 1")?;
        if share.is_some_and(|x| x < 1.0) {
            let what = "partial rotation of each head";
            return Err(part.unsupported("partial_rotary_factor", what, FAMILIES_HELP));
        }
    }
    let scaling = match &scaling {
        None => RopeScaling::None,
        Some(scaling) => rope_scaling(fields, scaling, theta, head_dim, max_positions)?,
    };
    Ok(Rope { theta, scaling })
}

fn rope_scaling(
    fields: &Fields<'_>,
    scaling: &Fields<'_>,
    theta: f64,
    head_dim: usize,
    max_positions: usize,
) -> Result<RopeScaling> {
    if scaling.get("full_attention").is_some() || scaling.get("sliding_attention").is_some() {
        return Err(scaling.unsupported("full_attention", "a separate rope per layer type", FAMILIES_HELP));
    }
    if scaling.get("mrope_section").is_some() {
        return Err(scaling.unsupported("mrope_section", "multimodal rope", FAMILIES_HELP));
    }
    let key = if scaling.get("rope_type").is_some() { "rope_type" } else { "type" };
    let factor = || scaling.required_number("factor", |x| x >= 1.0, "a number ≥ 1");
    let original = || -> Result<usize> {
        let outer = fields.size("original_max_position_embeddings", MAX_POSITIONS)?;
        let inner = scaling.size("original_max_position_embeddings", MAX_POSITIONS)?;
        Ok(outer.or(inner).unwrap_or(max_positions))
    };
    match scaling.text(key)?.unwrap_or("default") {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
        "dynamic" if head_dim > 2 => Ok(RopeScaling::Dynamic { factor: factor()? }),
        "dynamic" => Err(fields.wrong("head_dim", "more than 2 for dynamic rope")),
        "llama3" => {
            let low_freq_factor = scaling.required_number("low_freq_factor", |x| x > 0.0, "a number above 0")?;
            let high_freq_factor = scaling.required_number(
                "high_freq_factor",
                |x| x > low_freq_factor,
                &format!("a number above low_freq_factor ({low_freq_factor})"),
            )?;
            Ok(RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor,
                high_freq_factor,
                original_max_positions: original()?,
            })
        }
        "yarn" => yarn(scaling, theta, max_positions, original()?),
        other => {
            let what = format!("the rope type `{}`", other.escape_debug());
            Err(scaling.unsupported(key, what, "use default, linear, dynamic, llama3 or yarn"))
        }
    }
}

fn yarn(scaling: &Fields<'_>, theta: f64, max_positions: usize, original_max_positions: usize) -> Result<RopeScaling> {
    if theta <= 1.0 {
        return Err(scaling.wrong("rope_theta", "a number above 1 for yarn"));
    }
    let positive = |key: &str| scaling.number(key, |x| x > 0.0, "a number above 0");
    let not_negative = |key: &str| scaling.number(key, |x| x >= 0.0, "a number ≥ 0");
    let factor = match scaling.number("factor", |x| x >= 1.0, "a number ≥ 1")? {
        Some(factor) => factor,
        None => max_positions as f64 / original_max_positions as f64,
    };
    // The attention factor as the paper proposes, or DeepSeek's variant with two scales.
    let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
    let attention_factor =
        match (positive("attention_factor")?, not_negative("mscale")?, not_negative("mscale_all_dim")?) {
            (Some(attention_factor), _, _) => attention_factor,
            (None, Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => scale(mscale) / scale(all),
            _ => scale(1.0),
        };
    // transformers reads a 0 as "not given".
    let or = |value: Option<f64>, default: f64| value.filter(|x| *x != 0.0).unwrap_or(default);
    let beta_fast = or(not_negative("beta_fast")?, 32.0);
    let beta_slow = or(not_negative("beta_slow")?, 1.0);
    if beta_fast < beta_slow {
        return Err(scaling.wrong("beta_fast", format!("a number ≥ beta_slow ({beta_slow})")));
    }
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast,
        beta_slow,
        attention_factor,
        original_max_positions,
        truncate: scaling.flag("truncate", true)?,
    })
}
