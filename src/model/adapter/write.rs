//! Writes adapters as peft does.

use super::{AdapterShape, CONFIG, WEIGHTS};
use crate::error::Result;
use crate::io::json;
use crate::io::safetensors::{Dtype, TensorSpec, write_weights};
use crate::modules::{ModuleId, ModuleKind, ParamId};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// `adapter_config.json` of adapters of one shape on `modules`, in a model of `layers` layers. Keys are those that
/// every version of peft since 0.6 reads.
pub fn adapter_settings(modules: &BTreeSet<ModuleId>, shape: AdapterShape, layers: usize) -> Value {
    let mut kinds: BTreeMap<usize, Vec<ModuleKind>> = BTreeMap::new();
    for id in modules {
        kinds.entry(id.layer).or_default().push(id.kind);
    }
    let mut each = kinds.values();
    let common = each.next().filter(|first| each.all(|other| other == *first));
    let (targets, indices): (Vec<String>, Value) = match common {
        Some(common) => {
            let indices = if kinds.len() == layers { Value::Null } else { json!(kinds.keys().collect::<Vec<_>>()) };
            (common.iter().map(ModuleKind::to_string).collect(), indices)
        }
        None => {
            let path = |id: &ModuleId| ParamId::Weight(*id).to_string().trim_end_matches(".weight").to_owned();
            (modules.iter().map(path).collect(), Value::Null)
        }
    };
    let alpha = f64::from(shape.alpha);
    json!({
        "alpha_pattern": {},
        "auto_mapping": null,
        "base_model_name_or_path": null,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": indices,
        "lora_alpha": if alpha.fract() == 0.0 { json!(alpha as u64) } else { json!(alpha) },
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": shape.rank,
        "rank_pattern": {},
        "revision": null,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_rslora": shape.rslora,
    })
}

/// Writes an adapter directory into `out`: settings of [`adapter_settings`] or of an adapter that was opened, for the
/// model `base` (a path, or a name and a revision on the hub), and `tensors` in f32 with the values of `tensor`.
///
/// # Errors
/// [`Error::Failed`](crate::error::Error::Failed) with the position of a value that is not finite; errors of `tensor`;
/// [`Error::Io`](crate::error::Error::Io).
pub fn write_adapter(
    out: &Path,
    settings: &Value,
    (base, revision): (&str, Option<&str>),
    tensors: &[(ParamId, Vec<usize>)],
    mut tensor: impl FnMut(ParamId) -> Result<Vec<f32>>,
) -> Result<()> {
    let mut settings = settings.clone();
    settings["base_model_name_or_path"] = json!(base);
    settings["revision"] = json!(revision);
    settings["inference_mode"] = json!(true);
    json::write(&out.join(CONFIG), &settings)?;
    let adapted: BTreeSet<ParamId> = tensors.iter().map(|(id, _)| *id).collect();
    let spec = |(id, shape): &(ParamId, Vec<usize>)| {
        let name = match *id {
            // peft keeps the layer below an adapter under this name.
            ParamId::Bias(module) if adapted.contains(&ParamId::LoraA(module)) => {
                id.to_string().replace(".bias", ".base_layer.bias")
            }
            _ => id.to_string(),
        };
        TensorSpec { name: format!("base_model.model.{name}"), dtype: Dtype::F32, shape: shape.clone() }
    };
    let specs: Vec<TensorSpec> = tensors.iter().map(spec).collect();
    write_weights(&out.join(WEIGHTS), &specs, |i| tensor(tensors[i].0))
}
