//! What is trained: all parameters, or adapters.

use crate::engine::Lora;
use crate::error::Result;
use crate::model::ModelConfig;
use crate::modules::ModuleSet;
use crate::secure::{Adapters, Method, all_projections, attention_projections};
use clap::{Args, ValueEnum};

/// A [`Method`] by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum MethodName {
    /// All parameters
    Full,
    /// LoRA adapters
    Lora,
}

#[derive(Args)]
pub(super) struct MethodArgs {
    /// full, or lora: new adapters. With --adapter, `swat tune` trains that adapter further; `swat secure` merges it before
    /// anything else
    #[arg(long, value_enum, default_value_t = MethodName::Full)]
    pub method: MethodName,
    #[command(flatten)]
    pub lora: Lora,
    /// Projections with adapters, such as q_proj,v_proj or all-linear; q, k, v, o of every layer if not given
    #[arg(long, value_name = "SET")]
    pub lora_modules: Option<String>,
}

impl MethodArgs {
    /// The method for a model, with the adapters that a recipe says.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] for a set that the model does not have.
    pub fn method(&self, config: &ModelConfig, recipe: Option<Adapters>) -> Result<Method> {
        if self.method == MethodName::Full && recipe.is_none() {
            return Ok(Method::Full);
        }
        let modules = match &self.lora_modules {
            Some(text) => ModuleSet::parse(text, &config.cells())?,
            None if recipe.is_some_and(|recipe| recipe.all_linear) => all_projections(config.layers),
            None => attention_projections(config.layers),
        };
        let rank = recipe.map_or(self.lora.rank, |recipe| recipe.rank);
        Ok(Method::Lora { lora: Lora { rank, ..self.lora }, modules })
    }
}
