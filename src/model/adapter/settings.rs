//! `adapter_config.json`: which projections have adapters of which rank and scale, and what is not supported.

use super::patterns::{Names, Pattern};
use crate::error::Result;
use crate::model::config::Fields;
use crate::modules::{ModuleId, ParamId};
use serde_json::Value;
use std::collections::BTreeMap;

/// What to do with an adapter that is not plain LoRA.
pub(super) const MERGE: &str = "merge it into its model with peft (merge_and_unload, save_pretrained) and use that";

/// Rank and scale of a projection's adapter: y += scale · (x·Aᵀ)·Bᵀ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdapterShape {
    /// Rows of A and columns of B.
    pub rank: usize,
    /// `lora_alpha`.
    pub alpha: f32,
    /// Whether the scale is alpha / √rank (rsLoRA) and not alpha / rank.
    pub rslora: bool,
}

impl AdapterShape {
    /// Highest rank of an adapter.
    pub const MAX_RANK: usize = 1 << 16;
}

/// Biases that an adapter trains.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bias {
    None,
    Adapted,
    All,
}

pub(super) struct Settings {
    default: AdapterShape,
    targets: Names,
    excluded: Option<Names>,
    layers: Option<Vec<u64>>,
    layer_lists: Vec<Pattern>,
    ranks: Vec<(Pattern, usize)>,
    alphas: Vec<(Pattern, f32)>,
    saved: Vec<String>,
    bias: Bias,
    /// `ensure_weight_tying`.
    pub(super) ties: bool,
}

impl Settings {
    pub(super) fn read(value: &Value, place: &str) -> Result<Self> {
        let fields = Fields::new(value, place)?;
        refuse_unsupported(&fields, value)?;
        let names = |key: &str| -> Result<Option<Names>> {
            Ok(match fields.get(key) {
                Some(Value::String(text)) if text.eq_ignore_ascii_case("all-linear") => Some(Names::AllLinear),
                Some(Value::String(text)) => Some(Names::Pattern(Pattern::whole(text, &fields.place(key))?)),
                _ => strings(&fields, key)?.map(Names::List),
            })
        };
        let expected = "a list of names, a regular expression, or all-linear";
        let targets = names("target_modules")?.ok_or_else(|| fields.wrong("target_modules", expected))?;
        let positive = |x: f64| x > 0.0 && x <= f64::from(f32::MAX);
        let rank = fields.required_size("r", AdapterShape::MAX_RANK)?;
        let alpha = fields.number("lora_alpha", positive, "a number above 0")?.unwrap_or(8.0) as f32;
        let layers = match fields.get("layers_to_transform") {
            None => None,
            Some(Value::Array(list)) if list.is_empty() => None,
            Some(value) => {
                let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
                let wrong = || fields.wrong("layers_to_transform", "the index of a layer, or a list of them");
                Some(list.iter().map(|index| index.as_u64().ok_or_else(wrong)).collect::<Result<_>>()?)
            }
        };
        let place = fields.place("layers_pattern");
        let lists = strings(&fields, "layers_pattern")?.unwrap_or_default();
        let lists = lists.iter().filter(|list| !list.is_empty()).map(|list| Pattern::layers(list, &place));
        let wrong_rank = format!("a whole number from 1 to {}", AdapterShape::MAX_RANK);
        let rank_of =
            |value: &Value| value.as_u64().map(|n| n as usize).filter(|n| (1..=AdapterShape::MAX_RANK).contains(n));
        let alpha_of = |value: &Value| value.as_f64().filter(|x| positive(*x)).map(|x| x as f32);
        Ok(Self {
            default: AdapterShape { rank, alpha, rslora: fields.flag("use_rslora", false)? },
            targets,
            excluded: names("exclude_modules")?,
            layers,
            layer_lists: lists.collect::<Result<_>>()?,
            ranks: patterns(&fields, "rank_pattern", rank_of, &wrong_rank)?,
            alphas: patterns(&fields, "alpha_pattern", alpha_of, "a number above 0")?,
            saved: strings(&fields, "modules_to_save")?.unwrap_or_default(),
            bias: match fields.text("bias")? {
                None | Some("none") => Bias::None,
                Some("lora_only") => Bias::Adapted,
                Some("all") => Bias::All,
                Some(_) => return Err(fields.wrong("bias", "none, lora_only or all")),
            },
            ties: fields.flag("ensure_weight_tying", false)?,
        })
    }

    /// Rank and scale of a projection's adapter; `None` where it has none.
    pub(super) fn shape(&self, id: ModuleId) -> Result<Option<AdapterShape>> {
        let name = ParamId::Weight(id).to_string();
        let path = name.trim_end_matches(".weight");
        let excluded = match &self.excluded {
            Some(names) => names.select(path)?,
            None => false,
        };
        if excluded || self.saved.iter().any(|saved| contains(path, saved)) || !self.targets.select(path)? {
            return Ok(None);
        }
        if let (Names::List(names), Some(layers)) = (&self.targets, &self.layers)
            && !names.iter().any(|name| name == path)
        {
            let mut listed = self.layer_lists.is_empty();
            for list in &self.layer_lists {
                listed |= list.matches(path)?;
            }
            if !listed || !layers.contains(&(id.layer as u64)) {
                return Ok(None);
            }
        }
        let AdapterShape { rank, alpha, rslora } = self.default;
        let rank = first(&self.ranks, path)?.unwrap_or(rank);
        let alpha = first(&self.alphas, path)?.unwrap_or(alpha);
        Ok(Some(AdapterShape { rank, alpha, rslora }))
    }

    /// Whether a tensor of the model trains as a whole beside the adapters.
    pub(super) fn trains_whole(&self, id: ParamId, adapted: &BTreeMap<ModuleId, AdapterShape>) -> bool {
        let name = id.to_string();
        let path = name.trim_end_matches(".weight").trim_end_matches(".bias");
        let bias = match (self.bias, id) {
            (Bias::All, ParamId::Bias(_)) => true,
            (Bias::Adapted, ParamId::Bias(module)) => adapted.contains_key(&module),
            _ => false,
        };
        bias || self.saved.iter().any(|saved| path.ends_with(saved.as_str()) || path.contains(&format!("{saved}.")))
    }
}

/// Whether `name` is a part of the dotted path, as peft keeps adapters away from modules that are saved as a whole.
fn contains(path: &str, name: &str) -> bool {
    format!(".{path}.").contains(&format!(".{name}."))
}

/// The value of the first pattern that matches.
fn first<T: Copy>(patterns: &[(Pattern, T)], path: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        if pattern.matches(path)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// A string or a list of strings.
fn strings(fields: &Fields<'_>, key: &str) -> Result<Option<Vec<String>>> {
    let wrong = || fields.wrong(key, "a list of strings");
    match fields.get(key) {
        None => Ok(None),
        Some(Value::String(one)) => Ok(Some(vec![one.clone()])),
        Some(Value::Array(list)) => list
            .iter()
            .map(|value| value.as_str().map(str::to_owned).ok_or_else(wrong))
            .collect::<Result<_>>()
            .map(Some),
        Some(_) => Err(wrong()),
    }
}

/// An object of expressions and values.
fn patterns<T>(
    fields: &Fields<'_>,
    key: &str,
    value: impl Fn(&Value) -> Option<T>,
    expected: &str,
) -> Result<Vec<(Pattern, T)>> {
    let Some(inner) = fields.object(key)? else { return Ok(Vec::new()) };
    let entry = |(name, found): (&String, &Value)| {
        let found = value(found).ok_or_else(|| inner.wrong(name, expected))?;
        Ok((Pattern::end(name, &fields.place(key))?, found))
    };
    fields.get(key).and_then(Value::as_object).into_iter().flatten().map(entry).collect()
}

/// Whether a setting is in use: neither absent nor false, 0 or empty.
fn in_use(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => false,
        Some(Value::Bool(flag)) => *flag,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::Object(map)) => !map.is_empty(),
        Some(_) => true,
    }
}

fn refuse_unsupported(fields: &Fields<'_>, value: &Value) -> Result<()> {
    match fields.text("peft_type")? {
        Some("LORA") => {}
        Some(other) => {
            let what = format!("the adapter type {}", other.escape_debug());
            return Err(fields.unsupported("peft_type", what, MERGE));
        }
        None => return Err(fields.wrong("peft_type", "LORA: a configuration as peft writes it")),
    }
    match fields.text("task_type")? {
        None | Some("CAUSAL_LM") => {}
        Some(other) => {
            let what = format!("an adapter for {}", other.escape_debug());
            return Err(fields.unsupported("task_type", what, "use one for CAUSAL_LM"));
        }
    }
    for (key, what) in [
        ("use_dora", "DoRA"),
        ("use_qalora", "QALoRA"),
        ("lora_bias", "a bias of LoRA's B"),
        ("alora_invocation_tokens", "aLoRA, whose adapters work behind an invocation,"),
        ("layer_replication", "replicated layers"),
        ("trainable_token_indices", "training of single tokens"),
        ("target_parameters", "adapters on parameters that are no modules"),
        ("arrow_config", "Arrow routing"),
        ("kasa_config", "KaSA, which changes the base weights,"),
        ("monteclora_config", "MonteCLoRA"),
        ("velora_config", "VeLoRA"),
    ] {
        if in_use(value.get(key)) {
            return Err(fields.unsupported(key, what, MERGE));
        }
    }
    // What a later version of peft adds as a variant of LoRA.
    let mut keys = value.as_object().into_iter().flatten();
    let variant = keys.find(|(key, value)| key.starts_with("use_") && *key != "use_rslora" && in_use(Some(value)));
    if let Some((key, _)) = variant {
        return Err(fields.unsupported(key, "this variant of LoRA", MERGE));
    }
    match fields.get("init_lora_weights") {
        None | Some(Value::Bool(_)) => Ok(()),
        Some(Value::String(kind)) if ["gaussian", "eva", "orthogonal"].contains(&kind.as_str()) => Ok(()),
        Some(Value::String(kind)) => {
            let what = format!("the initialisation `{}`, which may change the base weights,", kind.escape_debug());
            let help = "save the adapter with peft's path_initial_model_for_weight_conversion, or merge it";
            Err(fields.unsupported("init_lora_weights", what, help))
        }
        Some(_) => Err(fields.wrong("init_lora_weights", "true, false or a name")),
    }
}
