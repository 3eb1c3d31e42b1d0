//! Layer shapes of the benched models, sizes of the runs, random tensors.

use serde::Deserialize;
use std::cell::Cell;
use std::sync::OnceLock;
use swat::backend::{Backend, Buffer, Documents, FloatElement};
use swat::rng::Philox;

/// The sizes of a model's layers.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    pub name: String,
    pub hidden: usize,
    pub ffn: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub layers: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
}

/// Sizes of the benches on a device, from `shapes.json`, which the peers in Python read too.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scale {
    /// Names of the models whose layer shapes are benched.
    models: Vec<String>,
    /// Tokens of a training batch.
    pub tokens: usize,
    /// Tokens of a chunk of the head.
    pub head_tokens: usize,
    /// Tokens of a decoding batch.
    pub decoded_tokens: Vec<usize>,
    /// (Documents, tokens of each) of a packed batch.
    pub packed: Vec<[usize; 2]>,
    /// Attention shapes for which other implementations publish their rates.
    pub published: Vec<Published>,
    /// (Queries, cached rows that each attends to) of a decoding step.
    pub spans: Vec<[usize; 2]>,
    /// Rows of logits, for the loss and for sampling.
    pub logit_rows: usize,
    pub sampled_rows: Vec<usize>,
    /// Rows of the embedding: more than a cache holds, fewer than a vocabulary has.
    pub table_rows: usize,
    /// Minimum number of elements that an optimizer step updates.
    pub stepped_elements: usize,
    /// Whole steps of the engine.
    pub steps: Vec<Steps>,
    /// Size of the rotated buffers in units of the last-level cache.
    pub rotated_caches: u64,
    /// Side of the square product and bytes of the copy that measure the roofline.
    pub ceiling_side: usize,
    pub ceiling_bytes: usize,
    /// Whether peer libraries are used.
    pub libraries: bool,
}

/// A model's heads over (documents, tokens of each).
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    pub model: String,
    pub packed: [usize; 2],
}

/// Whole steps of a model. Pairs are (count, tokens of each): documents of a training step, prompts of a sweep,
/// generated answers.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Steps {
    pub model: String,
    pub packed: [usize; 2],
    pub prompts: [usize; 2],
    pub answers: Vec<[usize; 2]>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Shapes {
    models: Vec<Model>,
    gpu: Scale,
    cpu: Scale,
    tiny: Scale,
}

fn shapes() -> &'static Shapes {
    static SHAPES: OnceLock<Shapes> = OnceLock::new();
    SHAPES.get_or_init(|| serde_json::from_str(include_str!("../shapes.json")).expect("models and scales"))
}

impl Scale {
    /// Sizes for a GPU.
    pub fn gpu() -> &'static Self {
        &shapes().gpu
    }

    /// Sizes for the CPU backend.
    pub fn cpu() -> &'static Self {
        &shapes().cpu
    }

    /// Sizes for tests; too small to be worth measuring.
    pub fn tiny() -> &'static Self {
        &shapes().tiny
    }

    /// The models, smallest first.
    pub fn models(&self) -> impl Iterator<Item = &'static Model> {
        shapes().models.iter().filter(|model| self.models.contains(&model.name))
    }
}

impl Model {
    /// The model of this name.
    ///
    /// # Panics
    /// If `shapes.json` has none.
    pub fn named(name: &str) -> &'static Self {
        shapes().models.iter().find(|model| model.name == name).expect("a model of shapes.json")
    }
}

impl Model {
    /// Width of the queries: heads × head_dim.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the keys, and of the values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Elements of a layer's projections: q, k, v, o, gate, up, down.
    pub fn modules(&self) -> [usize; 7] {
        let (q, kv, ffn) = (self.hidden * self.q_width(), self.hidden * self.kv_width(), self.hidden * self.ffn);
        [q, kv, kv, q, ffn, ffn, ffn]
    }
}

/// A tensor of normals. Each begins at another place of one draw, which is longer than any tile of a kernel.
pub fn random<B: Backend, T: FloatElement>(b: &B, len: usize) -> Buffer<B, T> {
    const DRAWN: usize = (1 << 20) + 7;
    static NORMALS: OnceLock<Vec<f32>> = OnceLock::new();
    thread_local!(static NEXT: Cell<usize> = const { Cell::new(0) });
    let normals = NORMALS.get_or_init(|| {
        let mut rng = Philox::new(2024, 0);
        (0..DRAWN).map(|_| rng.normal() as f32).collect()
    });
    let from = NEXT.replace(NEXT.get() + 104_729) % DRAWN;
    let values: Vec<T> = (normals.iter().cycle()).skip(from).take(DRAWN.min(len)).map(|x| T::from_f32(*x)).collect();
    let mut buffer = b.zeros(len).expect("memory for a tensor of a bench");
    for start in (0..len).step_by(DRAWN) {
        let end = len.min(start + DRAWN);
        b.write(&values[..end - start], buffer.range_mut(start..end)).expect("a working device");
    }
    buffer
}

/// A tensor of integers.
pub fn integers<B: Backend>(b: &B, values: impl IntoIterator<Item = u32>) -> Buffer<B, u32> {
    let values: Vec<u32> = values.into_iter().collect();
    let mut buffer = b.zeros(values.len()).expect("memory for a tensor of a bench");
    b.write(&values, buffer.view_mut()).expect("a working device");
    buffer
}

/// `count` documents of `tokens` each.
pub fn documents<B: Backend>(b: &B, count: usize, tokens: usize) -> Documents<B> {
    let starts: Vec<u32> = (0..=count).map(|i| (i * tokens) as u32).collect();
    Documents { device: integers(b, starts.iter().copied()), starts }
}
