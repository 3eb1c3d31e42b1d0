//! Examples: training conversations, security prompts, tasks; loss mask, packing, an exactly positioned loader.

mod example;
mod loader;

pub use example::Example;
pub use loader::{Loader, LoaderOptions, LoaderPosition};
