//! Examples: training conversations, security prompts, tasks; loss mask, packing, an exactly positioned loader.

mod example;
mod loader;
pub mod tiny;

pub use example::Example;
pub use loader::{Loader, LoaderOptions, LoaderPosition};
