//! Gradients on their way from the backward pass to the ranks that update them.

use crate::backend::{Backend, Buffer};
use crate::engine::{FinalGradients, Gradients, buckets};
use crate::error::Result;
use crate::group::{Group, ReduceScatter};
use crate::modules::ParamId;
use std::collections::VecDeque;

/// A bucket, with what has come of it.
type Filling<B> = Vec<(ParamId, Option<Buffer<B, <B as Backend>::Grad>>)>;

/// Begins the sum over all ranks of each bucket of gradients as soon as it is complete, in an order that depends on what
/// trains alone.
pub(super) struct Buckets<'g, B: Backend> {
    sums: Box<dyn ReduceScatter<B> + 'g>,
    /// Buckets whose sums have not begun.
    waiting: VecDeque<Filling<B>>,
    /// Tensors of those that have begun, in this order.
    begun: Vec<ParamId>,
}

impl<'g, B: Backend> Buckets<'g, B> {
    /// Buckets of at most so many bytes for the gradients of a step.
    pub(super) fn new(
        (group, most_bytes): (&'g dyn Group<B>, usize),
        backend: &B,
        gradients: &Gradients<B>,
    ) -> Result<Self> {
        let sizes = gradients.iter().map(|(id, gradient)| (id, gradient.bytes()));
        let missing = |bucket: Vec<ParamId>| bucket.into_iter().map(|id| (id, None)).collect();
        let waiting = buckets(sizes, most_bytes).into_iter().map(missing).collect();
        Ok(Self { sums: group.reduce_scatter(backend)?, waiting, begun: Vec::new() })
    }

    /// Takes gradients that are final.
    pub(super) fn add(&mut self, gradients: FinalGradients<B>) -> Result<()> {
        for (id, gradient) in gradients {
            if let Some((_, place)) = self.waiting.iter_mut().flatten().find(|(other, _)| *other == id) {
                *place = Some(gradient);
            }
        }
        while self.waiting.front().is_some_and(|bucket| bucket.iter().all(|(_, gradient)| gradient.is_some())) {
            let bucket = self.waiting.pop_front().unwrap_or_default();
            let mut tensors = Vec::with_capacity(bucket.len());
            for (id, gradient) in bucket {
                self.begun.push(id);
                tensors.extend(gradient);
            }
            self.sums.begin(tensors)?;
        }
        Ok(())
    }

    /// Waits for all sums, and puts them in the place of the gradients.
    pub(super) fn finish(self, gradients: &mut Gradients<B>) -> Result<()> {
        assert!(self.waiting.is_empty(), "a gradient is not final after the backward pass");
        let sums = self.sums.finish()?.into_iter().flatten();
        self.begun.into_iter().zip(sums).for_each(|(id, sum)| gradients.put_back(id, sum));
        Ok(())
    }
}
