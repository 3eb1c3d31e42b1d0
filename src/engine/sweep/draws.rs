//! Draws of noise: their members, their order, and the perturbed tensors.

use super::{Member, NoiseKind, SweepInputs};
use crate::backend::{Backend, Buffer, Direction, NoiseKey, Operator, Perturb, SquaredNorm, View, trace};
use crate::engine::decoder::{Overlay, upload};
use crate::engine::{Batch, Decoder};
use crate::error::Result;
use crate::modules::{Cell, ModuleId, ModuleSet, ParamId};
use std::cell::OnceCell;
use std::collections::{BTreeMap, HashMap};

/// A draw of noise and the members that use it.
pub(super) struct NoiseDraw<'m> {
    pub(super) cells: &'m ModuleSet,
    pub(super) seed: u64,
    /// (member, negative), one or two.
    pub(super) members: Vec<(usize, bool)>,
}

/// Σ W² of the decoder's tensors, each made when it is first perturbed: weights stay as they are during a sweep.
pub(super) struct Squares<B: Backend>(Vec<OnceCell<Buffer<B, f64>>>);

impl<B: Backend> Squares<B> {
    /// Empty.
    pub(super) fn new(decoder: &Decoder<B>) -> Self {
        Self(decoder.params.iter().map(|_| OnceCell::new()).collect())
    }

    /// Of the tensor at `index`, computed on first use.
    fn of(&self, decoder: &Decoder<B>, index: usize) -> Result<View<'_, B, f64>> {
        let cell = &self.0[index];
        if let Some(squares) = cell.get() {
            return Ok(squares.view());
        }
        let squares = SquaredNorm { w: decoder.params[index].values.view() }.run(&decoder.backend)?;
        Ok(cell.get_or_init(|| squares).view())
    }
}

pub(super) type Perturbed<B> = BTreeMap<ParamId, Buffer<B, <B as Backend>::Float>>;

/// The perturbed tensors as the forward pass takes them.
pub(super) fn overlay<B: Backend>(perturbed: &Perturbed<B>) -> Overlay<'_, B> {
    perturbed.iter().map(|(id, b)| (*id, b.view())).collect()
}

impl<B: Backend> Decoder<B> {
    /// The perturbed tensors of a draw, one set a member; `wanted` selects tensors.
    pub(super) fn perturbed(
        &self,
        draw: &NoiseDraw<'_>,
        wanted: impl Fn(ParamId) -> bool,
        inputs: &SweepInputs<'_, B>,
    ) -> Result<Vec<Perturbed<B>>> {
        let SweepInputs { options, squares, .. } = inputs;
        let _span = trace::phase("perturb");
        let mut all: Vec<Perturbed<B>> = draw.members.iter().map(|_| BTreeMap::new()).collect();
        for (stream, param) in self.params.iter().enumerate() {
            let id = param.id;
            let base = !matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_));
            if !base || !draw.cells.contains(id.cell()) || !wanted(id) {
                continue;
            }
            let _span = id.layer().map(trace::layer);
            let key = NoiseKey { seed: draw.seed, stream: stream as u64 };
            let given;
            let (direction, epsilon) = match &options.kind {
                NoiseKind::Gaussian => (Direction::Gaussian(key), options.epsilon),
                NoiseKind::Rademacher => (Direction::Rademacher(key), options.epsilon),
                NoiseKind::LowRank(rank) => {
                    let rows = if param.shape.len() > 1 { param.shape[0] } else { 1 };
                    (Direction::LowRank { key, rank: *rank, rows }, options.epsilon)
                }
                NoiseKind::Scale => (Direction::Scale, options.epsilon),
                NoiseKind::Zero => (Direction::Scale, -1.0),
                NoiseKind::Update(updates) => {
                    let Some(update) = updates.get(&id) else { continue };
                    given = upload(&self.backend, update)?;
                    (Direction::Given(given.view()), options.epsilon)
                }
                NoiseKind::Step(steps) => {
                    let Some((factor, step)) = steps.get(&id) else { continue };
                    given = upload(&self.backend, step)?;
                    (Direction::Given(given.view()), factor * options.epsilon)
                }
            };
            let mut buffers = Vec::with_capacity(2);
            for _ in 0..2 {
                buffers.push(self.backend.zeros(param.values.len())?);
            }
            let [mut plus, mut minus]: [Buffer<B, B::Float>; 2] =
                buffers.try_into().unwrap_or_else(|_| unreachable!("two were made"));
            let both = draw.members.iter().any(|(_, negative)| *negative) && options.kind != NoiseKind::Zero;
            let twin = both.then(|| minus.view_mut());
            let squares = if direction.has_norm() { Some(squares.of(self, stream)?) } else { None };
            let (w, plus_view) = (param.values.view(), plus.view_mut());
            Perturb { w, squares, direction, epsilon, plus: plus_view, minus: twin }.run(&self.backend)?;
            match draw.members.as_slice() {
                [(_, negative)] => {
                    all[0].insert(id, if *negative && both { minus } else { plus });
                }
                _ => {
                    if !both {
                        self.backend.copy(plus.view(), minus.view_mut())?;
                    }
                    all[0].insert(id, plus);
                    all[1].insert(id, minus);
                }
            }
        }
        Ok(all)
    }
}

/// 0 for the embedding, l + 1 for layer l, layers + 1 for the final norm and the head.
pub(super) fn stage(cell: Cell, layers: usize) -> usize {
    match cell {
        Cell::Embedding => 0,
        Cell::FinalNorm | Cell::Head => layers + 1,
        Cell::Norms(layer) | Cell::Module(ModuleId { layer, .. }) => layer + 1,
    }
}

/// Groups members by their draw: antithetic twins share one.
pub(super) fn draws(members: &[Member]) -> Vec<NoiseDraw<'_>> {
    let mut draws: Vec<NoiseDraw<'_>> = Vec::new();
    let mut open: HashMap<(String, u64), usize> = HashMap::new();
    for (i, member) in members.iter().enumerate() {
        let text: Vec<String> = member.cells.iter().map(|c| c.to_string()).collect();
        let key = (text.join(","), member.seed);
        if let Some(d) = open.get(&key).copied()
            && draws[d].members.len() == 1
            && draws[d].members[0].1 != member.negative
        {
            // The plus member first, as `perturbed` returns them.
            let position = usize::from(member.negative);
            draws[d].members.insert(position, (i, member.negative));
            continue;
        }
        open.insert(key, draws.len());
        draws.push(NoiseDraw { cells: &member.cells, seed: member.seed, members: vec![(i, member.negative)] });
    }
    draws
}

/// Groups of draws with at most `members` members; draws over several layers are kept apart.
pub(super) fn grouped(draws: Vec<NoiseDraw<'_>>, members: usize) -> Vec<Vec<NoiseDraw<'_>>> {
    let one_layer = |d: &NoiseDraw<'_>| {
        let mut layers: Vec<_> = d.cells.iter().map(|c| c.layer()).collect();
        layers.dedup();
        layers.len() == 1
    };
    let (single, joint): (Vec<_>, Vec<_>) = draws.into_iter().partition(one_layer);
    let mut groups = Vec::new();
    for draws in [single, joint] {
        let (mut group, mut count) = (Vec::new(), 0);
        for draw in draws {
            if count + draw.members.len() > members && count > 0 {
                groups.push(std::mem::take(&mut group));
                count = 0;
            }
            count += draw.members.len();
            group.push(draw);
        }
        if count > 0 {
            groups.push(group);
        }
    }
    groups
}

/// The same prompts `count` times, one after another.
pub(super) fn repeated(prompts: &Batch, count: usize) -> Batch {
    let tokens = prompts.tokens.len() as u32;
    let mut starts = vec![0];
    for m in 0..count as u32 {
        starts.extend(prompts.starts[1..].iter().map(|s| s + m * tokens));
    }
    Batch {
        tokens: prompts.tokens.repeat(count),
        positions: prompts.positions.repeat(count),
        starts,
        targets: Vec::new(),
        terms: None,
    }
}
