//! Key-value cache and batched generation.

use super::decoder::{Overlay, read_floats};
use super::pool::{Floats, Scratch, Stats};
use super::prefix::DistinctRows;
use super::{Batch, Decoder};
use crate::backend::{
    AttentionDecode, Backend, Buffer, DecodeSpans, In, Operator, Sample, Sampling, ScatterRows, View, trace,
};
use crate::error::{Error, Result};
use crate::modules::ParamId;
use crate::options::{count, default_from_args, mib_or_none};
use crate::rng::{uniform, words};

/// Options of generation.
#[derive(Clone, Debug, PartialEq, clap::Args)]
pub struct GenerateOptions {
    /// Longest answer, in tokens
    #[arg(long, value_parser = count, default_value_t = 256)]
    pub max_new_tokens: usize,
    /// Greedy, or a temperature and a nucleus.
    #[command(flatten)]
    pub sampling: Sampling,
    /// Seed of the draws; prompt i, token j always get the same uniform, whatever else is in the batch.
    #[arg(skip)]
    pub seed: u64,
    /// Tokens that end an answer.
    #[arg(skip)]
    pub stop: Vec<u32>,
    /// Memory of the key-value cache, in MiB; decides how many prompts run at once (0: one)
    #[arg(long = "cache-mib", value_name = "CACHE_MIB", value_parser = mib_or_none, default_value = "1024")]
    pub cache_bytes: u64,
}

default_from_args!(GenerateOptions);

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Finish {
    /// A stop token.
    Stop,
    /// `max_new_tokens`, the end of the context, or the caller of [`Decoder::generate_until`].
    Length,
}

/// Whether the answer to a prompt, by its index and with these tokens so far, ends here.
type Ends<'a> = &'a dyn Fn(usize, &[u32]) -> bool;

/// One answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// New tokens, the stop token not among them.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Most sequences in a decoding step.
const MAX_SLOTS: usize = 64;

/// Keys and values of all layers: `slots` sequences of up to `capacity` tokens.
struct Cache<B: Backend> {
    layers: Vec<CachedLayer<B>>,
    capacity: usize,
}

/// Keys and values of one layer, each [slots·capacity, kv_width].
struct CachedLayer<B: Backend> {
    keys: Buffer<B, B::Float>,
    values: Buffer<B, B::Float>,
}

/// Inputs of a decoding step: a token of each running sequence.
struct DecodeInputs<'a, B: Backend> {
    tokens: View<'a, B, u32>,
    positions: View<'a, B, u32>,
    /// Rows of the cache that get their keys and values.
    rows: View<'a, B, u32>,
    /// Rows of the cache that they see.
    spans: DecodeSpans<'a, B>,
    rope: View<'a, B, f32>,
}

/// Uniforms that tokens are sampled by (unspecified where greedy), and the tokens.
struct SampleBuffers<'p, B: Backend> {
    uniforms: Stats<'p, B>,
    tokens: Scratch<'p, B, u32>,
}

/// A sequence that is being decoded.
struct Slot {
    prompt: usize,
    last: u32,
    /// Tokens in the cache.
    len: usize,
    tokens: Vec<u32>,
    limit: usize,
}

impl<B: Backend> Decoder<B> {
    /// Answers to `prompts`; `on_token(prompt, token)` is called for each token, stop tokens included.
    ///
    /// Several sequences are decoded at once (continuous batching): a prompt takes the slot of each one that ends. A
    /// prefix that prompts of one prefill share is computed once.
    ///
    /// # Errors
    /// [`Error::Input`] where a prompt is empty or longer than the context; [`Error::Failed`] where no token can be
    /// sampled; [`Error::Device`] or [`Error::Memory`] where the device fails.
    pub fn generate(
        &self,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(usize, u32),
    ) -> Result<Vec<Generation>> {
        self.generate_until(prompts, options, on_token, &|_, _| false)
    }

    /// [`Decoder::generate`] of answers that end as well where `ends(prompt, tokens)` says so of the tokens so far; it is
    /// asked after each token.
    ///
    /// # Errors
    /// As [`Decoder::generate`].
    pub fn generate_until(
        &self,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(usize, u32),
        ends: Ends<'_>,
    ) -> Result<Vec<Generation>> {
        let context = self.longest_context();
        for (i, prompt) in prompts.iter().enumerate() {
            if prompt.is_empty() || prompt.len() >= context {
                let found = format!("{} tokens", prompt.len());
                return Err(Error::input(format!("prompt {}", i + 1), found, format!("1 to {} tokens", context - 1)));
            }
        }
        let mut answers: Vec<Option<Generation>> = prompts.iter().map(|_| None).collect();
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let capacity = (longest + options.max_new_tokens).min(context);
        let token_bytes = 2 * self.config.layers * self.config.kv_width() * size_of::<B::Float>();
        let fitting = options.cache_bytes as usize / (capacity * token_bytes).max(1);
        let slots = fitting.clamp(1, MAX_SLOTS).min(prompts.len().max(1));
        let span = trace::phase("cache");
        let mut cache = Cache::new(&self.backend, self.config.layers, slots, capacity, self.config.kv_width())?;
        drop(span);
        let mut active: Vec<Option<Slot>> = (0..slots).map(|_| None).collect();
        let mut next = 0;
        loop {
            let free: Vec<usize> = (0..slots).filter(|i| active[*i].is_none()).collect();
            let arrivals: Vec<(usize, usize)> = free.into_iter().zip(next..prompts.len()).collect();
            next += arrivals.len();
            if !arrivals.is_empty() {
                let tokens = self.prefill(prompts, &arrivals, &mut cache, options)?;
                for ((slot, prompt), token) in arrivals.into_iter().zip(tokens) {
                    let len = prompts[prompt].len();
                    let limit = options.max_new_tokens.min(capacity - len);
                    active[slot] = Some(Slot { prompt, last: token, len, tokens: Vec::new(), limit });
                    settle(&mut active[slot], token, (options, ends), &mut answers, on_token);
                }
            }
            let running: Vec<usize> = (0..slots).filter(|i| active[*i].is_some()).collect();
            if running.is_empty() && next == prompts.len() {
                break;
            }
            if running.is_empty() {
                continue;
            }
            let tokens = self.decode_step(&active, &running, &mut cache, options)?;
            for (slot, token) in running.into_iter().zip(tokens) {
                if let Some(s) = &mut active[slot] {
                    s.len += 1;
                    s.last = token;
                }
                settle(&mut active[slot], token, (options, ends), &mut answers, on_token);
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }

    /// Runs whole prompts, fills their slots of the cache and draws their first tokens.
    fn prefill(
        &self,
        prompts: &[Vec<u32>],
        arrivals: &[(usize, usize)],
        cache: &mut Cache<B>,
        options: &GenerateOptions,
    ) -> Result<Vec<u32>> {
        let _span = trace::phase("prefill");
        let none = Overlay::new();
        let batch = Batch::from_prompts(arrivals.iter().map(|(_, p)| prompts[*p].as_slice()));
        let packed = self.pack_distinct(&batch, DistinctRows::of(&batch))?;
        let rows: Vec<u32> = arrivals
            .iter()
            .map(|(slot, p)| (slot * cache.capacity, prompts[*p].len()))
            .flat_map(|(first, len)| (first..first + len).map(|row| row as u32))
            .collect();
        let rows = self.indices(&rows)?;
        let width = self.config.kv_width();
        let mut x = self.embed(&none, &packed.select(&batch.tokens))?;
        let last_rows = batch.last_rows();
        let last_layer = self.config.layers - 1;
        for layer in 0..self.config.layers {
            let _span = trace::layer(layer);
            let CachedLayer { keys, values } = &mut cache.layers[layer];
            let mut fill = |k, v| {
                ScatterRows { from: k, rows: rows.view(), to: keys.view_mut(), width }.run(&self.backend)?;
                ScatterRows { from: v, rows: rows.view(), to: values.view_mut(), width }.run(&self.backend)
            };
            x = if layer == last_layer {
                let (out, k, v) = self.layer_forward_rows(&none, layer, x.view(), &packed, &batch, &last_rows)?;
                fill(k.view(), v.view())?;
                out
            } else {
                let (attention, out) = self.layer_attention(&none, layer, x, &packed)?;
                match &packed.dedup {
                    None => fill(attention.k.view(), attention.v.view())?,
                    Some(dedup) => {
                        let [k, v] = [&attention.k, &attention.v].map(|x| dedup.expand(self, x.view()));
                        fill(k?.view(), v?.view())?;
                    }
                }
                out
            };
        }
        let (normed, _) = self.norm(&none, ParamId::FinalNorm, x.view())?;
        let draws: Vec<(usize, usize)> = arrivals.iter().map(|(_, p)| (*p, 0)).collect();
        let mut samples = self.sample_buffers(&draws, options)?;
        let logits = self.sample(normed.view(), &mut samples, options)?;
        self.read_tokens(&samples, &logits)
    }

    /// One token for each running slot.
    fn decode_step(
        &self,
        active: &[Option<Slot>],
        running: &[usize],
        cache: &mut Cache<B>,
        options: &GenerateOptions,
    ) -> Result<Vec<u32>> {
        let _span = trace::phase("decode");
        let count = running.len();
        let states: Vec<(usize, &Slot)> =
            running.iter().filter_map(|slot| active[*slot].as_ref().map(|s| (*slot, s))).collect();
        let longest = states.iter().map(|(_, s)| s.len + 1).max().unwrap_or(0);
        let rope = self.rope(longest)?;
        // All host inputs in one copy.
        let first = |slot: usize| slot * cache.capacity;
        let tokens = states.iter().map(|(_, s)| s.last);
        let positions = states.iter().map(|(_, s)| s.len as u32);
        let rows = states.iter().map(|(slot, s)| (first(*slot) + s.len) as u32);
        let spans = states.iter().flat_map(|(slot, s)| [first(*slot) as u32, s.len as u32 + 1]);
        let host: Vec<u32> = tokens.chain(positions).chain(rows).chain(spans).collect();
        let on_device = self.indices(&host)?;
        let [tokens, positions, rows] = [0, 1, 2].map(|part| on_device.range(part * count..(part + 1) * count));
        let spans = DecodeSpans { host: &host[3 * count..], device: on_device.range(3 * count..5 * count) };
        let inputs = DecodeInputs { tokens, positions, rows, spans, rope: rope.view() };
        let draws: Vec<(usize, usize)> = states.iter().map(|(_, s)| (s.prompt, s.tokens.len())).collect();
        let mut samples = self.sample_buffers(&draws, options)?;
        let logits = self.backend.replay(|| self.decode(&inputs, cache, &mut samples, options))?;
        self.read_tokens(&samples, &logits)
    }

    /// The device's work for a step: logits, and tokens sampled from them.
    fn decode(
        &self,
        inputs: &DecodeInputs<'_, B>,
        cache: &mut Cache<B>,
        samples: &mut SampleBuffers<'_, B>,
        options: &GenerateOptions,
    ) -> Result<Floats<'_, B>> {
        let none = Overlay::new();
        let (c, count) = (&self.config, inputs.tokens.len());
        let (rows, width) = (|| inputs.rows.clone(), c.kv_width());
        let mut x = self.embed_rows(&none, inputs.tokens.clone())?;
        for (layer, CachedLayer { keys, values }) in cache.layers.iter_mut().enumerate() {
            let _span = trace::layer(layer);
            let (normed, _) = self.norm(&none, ParamId::InputNorm(layer), x.view())?;
            let mut q = self.floats(count * c.q_width())?;
            let mut k = self.floats(count * width)?;
            let mut v = self.floats(count * width)?;
            let outs = [q.view_mut(), k.view_mut(), v.view_mut()];
            self.project_qkv(&none, layer, normed.view(), outs, inputs.positions.clone(), inputs.rope.clone())?;
            ScatterRows { from: k.view(), rows: rows(), to: keys.view_mut(), width }.run(&self.backend)?;
            ScatterRows { from: v.view(), rows: rows(), to: values.view_mut(), width }.run(&self.backend)?;
            let mut mixed = self.floats(count * c.q_width())?;
            let (q, k, v, o) = (q.view(), keys.view(), values.view(), mixed.view_mut());
            let (spans, shape) = (inputs.spans.clone(), self.attention_shape(layer));
            AttentionDecode { q, k, v, o, spans, shape }.run(&self.backend)?;
            let mid = self.output_projection(&none, layer, mixed.view(), x.view())?;
            self.mlp_output(&none, layer, mid.view(), x.view_mut())?;
        }
        let (normed, _) = self.norm(&none, ParamId::FinalNorm, x.view())?;
        self.sample(normed.view(), samples, options)
    }

    /// Uniforms for the tokens (prompt, index in the answer) of `draws`, and room for the tokens.
    fn sample_buffers(&self, draws: &[(usize, usize)], options: &GenerateOptions) -> Result<SampleBuffers<'_, B>> {
        let mut uniforms = self.stats(draws.len())?;
        if options.sampling.temperature > 0.0 {
            let uniform = |(prompt, token): &(usize, usize)| {
                let [word, ..] = words(options.seed, *prompt as u64, *token as u64);
                // The generator's uniforms lie in (0, 1]; a draw takes [0, 1).
                1.0 - uniform(word)
            };
            let host: Vec<f32> = draws.iter().map(uniform).collect();
            self.backend.write(&host, uniforms.view_mut())?;
        }
        Ok(SampleBuffers { uniforms, tokens: self.pool.indices.take(&self.backend, draws.len())? })
    }

    /// Logits of normed rows, and a token sampled from each.
    fn sample(
        &self,
        normed: In<'_, B>,
        samples: &mut SampleBuffers<'_, B>,
        options: &GenerateOptions,
    ) -> Result<Floats<'_, B>> {
        let logits = self.head_logits(&Overlay::new(), normed)?;
        let SampleBuffers { uniforms, tokens } = samples;
        let (vocab, sampling) = (self.config.vocab, options.sampling);
        let (uniforms, tokens) = (uniforms.view(), tokens.view_mut());
        Sample { logits: logits.view(), uniforms, tokens, vocab, sampling }.run(&self.backend)?;
        Ok(logits)
    }

    /// The sampled tokens; waits for the device.
    fn read_tokens(&self, samples: &SampleBuffers<'_, B>, logits: &Floats<'_, B>) -> Result<Vec<u32>> {
        let mut host = vec![0; samples.tokens.view().len()];
        self.backend.read(samples.tokens.view(), &mut host)?;
        if host.iter().any(|t| *t as usize >= self.config.vocab) {
            let finite = read_floats(&self.backend, logits.view())?.iter().all(|x| x.is_finite());
            let what = if finite { "no token could be drawn" } else { "the logits are not finite" };
            return Err(Error::failed(what, "check the model's weights"));
        }
        Ok(host)
    }
}

/// Appends a sampled token to its slot, and finishes the answer at its end.
fn settle(
    slot: &mut Option<Slot>,
    token: u32,
    (options, ends): (&GenerateOptions, Ends<'_>),
    answers: &mut [Option<Generation>],
    on_token: &mut dyn FnMut(usize, u32),
) {
    let Some(s) = slot else { return };
    let stop = options.stop.contains(&token);
    if s.limit > 0 {
        on_token(s.prompt, token);
        if !stop {
            s.tokens.push(token);
        }
    }
    if stop || s.tokens.len() >= s.limit || ends(s.prompt, &s.tokens) {
        let finish = if stop && s.limit > 0 { Finish::Stop } else { Finish::Length };
        answers[s.prompt] = Some(Generation { tokens: std::mem::take(&mut s.tokens), finish });
        *slot = None;
    }
}

impl<B: Backend> Cache<B> {
    fn new(backend: &B, layers: usize, slots: usize, capacity: usize, width: usize) -> Result<Self> {
        let len = slots * capacity * width;
        let layers = (0..layers)
            .map(|_| Ok(CachedLayer { keys: backend.zeros(len)?, values: backend.zeros(len)? }))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { layers, capacity })
    }
}
