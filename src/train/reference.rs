//! What the model before the run says of the training data: the reference of the constrained loss, and the teacher of
//! distillation. Computed once, and kept in the run's directory.

use super::tensors::{read_values, spec};
use super::{Callbacks, RunDir, TuneOptions, Tuner};
use crate::backend::{Backend, Element, IGNORE};
use crate::data::Example;
use crate::engine::{Batch, Decoder, TokenTerms};
use crate::error::{Error, FileOp, Result};
use crate::io::safetensors::{Dtype, Safetensors, SafetensorsWriter, TensorSpec};
use crate::io::sync_dir;
use crate::progress::Progress;
use std::collections::BTreeMap;
use std::path::Path;

const FILE: &str = "reference.safetensors";
/// Name while it is written: [`crate::io`] takes it for a file of swat's.
const DRAFT: &str = ".reference.partial";
/// Most tokens of the teacher's distribution, the likeliest.
pub(super) const TEACHER: usize = 64;
/// β of an answer's first token, of the [`FIRST`] next ones, and of the rest (Qi et al., arXiv 2406.05946, section 4.1).
const BETAS: [f32; 3] = [0.5, 2.0, 0.1];
/// Tokens of the second β.
const FIRST: usize = 4;

/// The reference of a run's examples.
pub(super) struct Reference {
    /// Factor on [`BETAS`].
    constrain: Option<f32>,
    /// Weight of the divergence from the teacher.
    distil: Option<f32>,
    /// −log π₀ of the trained tokens of one example after another, and where those of each begin; empty where nothing
    /// is constrained.
    losses: Vec<f32>,
    starts: Vec<usize>,
    /// The teacher's rows of each distilled example: where they begin, in rows. Equal examples share them.
    teachers: BTreeMap<usize, usize>,
    /// [rows, width]
    ids: Vec<u32>,
    probs: Vec<f32>,
    width: usize,
}

/// Which tokens have a loss: all that are trained but the first, which nothing predicts.
fn trained(example: &Example) -> impl Iterator<Item = bool> {
    example.trained.iter().copied().skip(1)
}

fn trained_tokens(example: &Example) -> usize {
    trained(example).filter(|trained| *trained).count()
}

/// β of each trained token: it counts from the first of its answer.
fn betas(example: &Example, scale: f32) -> impl Iterator<Item = f32> {
    let mut place = 0;
    trained(example).filter_map(move |trained| {
        place = if trained { place + 1 } else { 0 };
        let beta = match place {
            0 => return None,
            1 => BETAS[0],
            2.. if place <= 1 + FIRST => BETAS[1],
            _ => BETAS[2],
        };
        Some(scale * beta)
    })
}

impl Reference {
    /// Its shape for these examples, without values.
    fn shape(examples: &[Example], constrain: Option<f32>, distil: Option<f32>, vocab: usize) -> Self {
        let mut starts = vec![0];
        for example in examples {
            starts.push(starts[starts.len() - 1] + trained_tokens(example));
        }
        let (mut teachers, mut rows, mut known) = (BTreeMap::new(), 0, BTreeMap::new());
        for (i, example) in examples.iter().enumerate().filter(|(_, example)| distil.is_some() && example.replayed) {
            let first = *known.entry((&example.tokens, &example.trained)).or_insert_with(|| {
                rows += trained_tokens(example);
                rows - trained_tokens(example)
            });
            teachers.insert(i, first);
        }
        let width = if distil.is_some() { TEACHER.min(vocab) } else { 0 };
        let losses = if constrain.is_some() { starts[examples.len()] } else { 0 };
        let (losses, ids, probs) = (vec![0.0; losses], vec![0; rows * width], vec![0.0; rows * width]);
        Self { constrain, distil, losses, starts, teachers, ids, probs, width }
    }

    /// Fills it by forward passes of at most `tokens` tokens, or one example.
    fn compute<B: Backend>(
        &mut self,
        decoder: &Decoder<B>,
        examples: &[Example],
        tokens: usize,
        callbacks: &mut dyn Callbacks<B>,
    ) -> Result<()> {
        let own = |i: &usize| self.constrain.is_some() || self.teachers.contains_key(i);
        let wanted: Vec<usize> = (0..examples.len()).filter(own).collect();
        let (mut done, mut taught) = (0, 0);
        while done < wanted.len() {
            let (mut end, mut size) = (done, 0);
            while end < wanted.len() && (end == done || size + examples[wanted[end]].tokens.len() <= tokens) {
                size += examples[wanted[end]].tokens.len();
                end += 1;
            }
            let group = &wanted[done..end];
            if self.constrain.is_some() {
                let batch = Batch::from_examples(group.iter().map(|i| &examples[*i]));
                let losses = decoder.losses(&batch)?;
                let losses = losses.into_iter().zip(&batch.targets).filter(|(_, target)| **target != IGNORE);
                let to = self.starts[group[0]]..self.starts[group[group.len() - 1] + 1];
                self.losses[to].iter_mut().zip(losses).for_each(|(to, (loss, _))| *to = loss);
            }
            // Rows are in the order of examples; those that are there already belong to equal ones.
            let mut fresh = Vec::new();
            for i in group {
                if self.teachers.get(i) == Some(&taught) {
                    taught += trained_tokens(&examples[*i]);
                    fresh.push(*i);
                }
            }
            if let Some(first) = fresh.first() {
                let batch = Batch::from_examples(fresh.iter().map(|i| &examples[*i]));
                let (ids, probs) = decoder.likeliest_tokens(&batch, self.width)?;
                let to = self.teachers[first] * self.width..taught * self.width;
                self.ids[to.clone()].copy_from_slice(&ids);
                self.probs[to].copy_from_slice(&probs);
            }
            done = end;
            callbacks.prepares(Progress::new("reference", done, wanted.len()));
        }
        Ok(())
    }

    /// Terms of a batch of these examples; `None` where there are none.
    pub(super) fn terms(&self, examples: &[Example], batch: &[usize]) -> Option<TokenTerms> {
        if self.constrain.is_none() && !batch.iter().any(|i| self.teachers.contains_key(i)) {
            return None;
        }
        let mut terms = TokenTerms { distil: self.distil.unwrap_or(0.0), ..TokenTerms::default() };
        for i in batch {
            let rows = trained_tokens(&examples[*i]);
            match self.constrain {
                Some(scale) => {
                    terms.reference.extend(&self.losses[self.starts[*i]..][..rows]);
                    terms.beta.extend(betas(&examples[*i], scale));
                }
                None => {
                    terms.reference.resize(terms.reference.len() + rows, 0.0);
                    terms.beta.resize(terms.beta.len() + rows, 0.0);
                }
            }
            match self.teachers.get(i) {
                Some(first) => {
                    let own = first * self.width..(first + rows) * self.width;
                    terms.ids.extend(&self.ids[own.clone()]);
                    terms.probs.extend(&self.probs[own]);
                }
                None => {
                    terms.ids.resize(terms.ids.len() + rows * self.width, 0);
                    terms.probs.resize(terms.probs.len() + rows * self.width, 0.0);
                }
            }
        }
        Some(terms)
    }

    /// What the file holds: names, shapes and bytes.
    fn tensors(&self) -> [(TensorSpec, &[u8]); 3] {
        [
            (spec::<f32>("losses".into(), &[self.losses.len()]), bytemuck::cast_slice(&self.losses)),
            (spec::<u32>("teacher.ids".into(), &[self.ids.len()]), bytemuck::cast_slice(&self.ids)),
            (spec::<f32>("teacher.probs".into(), &[self.probs.len()]), bytemuck::cast_slice(&self.probs)),
        ]
    }

    /// Hash of the values, of a run with this identity.
    fn mark(&self, identity: &str) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(identity.as_bytes());
        for (_, bytes) in self.tensors() {
            hasher.update(bytes);
        }
        *hasher.finalize().as_bytes()
    }

    fn save(&self, dir: &Path, identity: &str) -> Result<()> {
        let draft = dir.join(DRAFT);
        let mark = self.mark(identity);
        let mark = (TensorSpec { name: "mark".into(), dtype: Dtype::U8, shape: vec![mark.len()] }, &mark[..]);
        let tensors = self.tensors().into_iter().chain([mark]);
        let (specs, bytes): (Vec<_>, Vec<_>) = tensors.unzip();
        let mut writer = SafetensorsWriter::create(&draft, &specs)?;
        bytes.into_iter().try_for_each(|bytes| writer.write(bytes))?;
        writer.finish()?;
        let path = dir.join(FILE);
        std::fs::rename(&draft, &path).map_err(Error::io(&path, FileOp::Rename))?;
        sync_dir(dir)
    }

    /// Reads the values of a run with this identity; false where the file is another's, or damaged.
    fn load(&mut self, path: &Path, identity: &str) -> Result<bool> {
        let file = Safetensors::open(path)?;
        self.losses = read_values(&file, "losses", self.losses.len())?;
        self.ids = read_values(&file, "teacher.ids", self.ids.len())?;
        self.probs = read_values(&file, "teacher.probs", self.probs.len())?;
        Ok(file.typed_bytes("mark", Dtype::U8, 32)? == self.mark(identity))
    }
}

impl<B: Backend> Tuner<'_, B> {
    /// The reference, by the decoder as it is before the run; `None` where the loss needs none.
    pub(super) fn reference(&self, callbacks: &mut dyn Callbacks<B>) -> Result<Option<Reference>> {
        let (constrain, distil) = (self.options.constrain, self.options.distil);
        if constrain.is_none() && distil.is_none() {
            return Ok(None);
        }
        let examples = self.loader.examples();
        let shape = || Reference::shape(examples, constrain, distil, self.decoder.config.vocab);
        // Of several ranks, the first has files.
        let run_dir = self.run_dir.as_ref().filter(|_| self.group.share().rank == 0);
        let file = run_dir.map(|run| (run, run.dir.join(FILE)));
        let kept = file.as_ref().filter(|(run, path)| run.resume && path.exists());
        if let Some((run, path)) = kept {
            let mut reference = shape();
            match reference.load(path, &self.reference_identity(run)) {
                Ok(true) => return Ok(Some(reference)),
                Ok(false) => callbacks.note(&format!("{} is of another run, and computed again", path.display())),
                Err(why) => callbacks.note(&format!("the reference is computed again: {why}")),
            }
        }
        let mut reference = shape();
        reference.compute(self.decoder, examples, self.loader.largest_batch().tokens, callbacks)?;
        self.decoder.release_pool();
        if let Some((run, _)) = file {
            std::fs::create_dir_all(&run.dir).map_err(Error::io(&run.dir, FileOp::Create))?;
            reference.save(&run.dir, &self.reference_identity(run))?;
        }
        Ok(Some(reference))
    }

    /// What the reference's values depend on, beside its shape.
    fn reference_identity(&self, run: &RunDir) -> String {
        let device = self.decoder.backend.name();
        let device = device.split(':').next().unwrap_or_default();
        format!("{}\n{}\n{device} {}\n{}", run.model, run.data, B::Float::NAME, replayed_hash(self.loader.examples()))
    }
}

/// Hash of which examples are replayed.
pub(super) fn replayed_hash(examples: &[Example]) -> String {
    let marks: Vec<u8> = examples.iter().map(|example| u8::from(example.replayed)).collect();
    blake3::hash(&marks).to_hex().to_string()
}

/// Bytes of the reference's file of these examples, beside its header.
pub(super) fn reference_bytes(examples: &[Example], options: &TuneOptions) -> u64 {
    let constrained = if options.constrain.is_some() { 4 } else { 0 };
    let of = |example: &Example| {
        let taught = if options.distil.is_some() && example.replayed { 8 * TEACHER } else { 0 };
        (trained_tokens(example) * (taught + constrained)) as u64
    };
    examples.iter().map(of).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_has_its_own_first_tokens() {
        let mask = "..+++++++.++..+++++";
        let trained: Vec<bool> = mask.bytes().map(|c| c == b'+').collect();
        let example = Example { tokens: vec![0; trained.len()], trained, replayed: false };
        let found: Vec<f32> = betas(&example, 2.0).collect();
        let first = [1.0, 4.0, 4.0, 4.0, 4.0, 0.2, 0.2];
        assert_eq!(found, [&first[..], &first[..2], &first[..5]].concat());
        assert_eq!(found.len(), trained_tokens(&example));
    }
}
