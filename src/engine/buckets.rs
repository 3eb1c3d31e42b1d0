//! Buckets of gradients, in the order in which a backward pass finishes them.

use crate::modules::ParamId;

/// Most bytes of a bucket of several tensors, by default: those of PyTorch's DistributedDataParallel.
pub const BUCKET_BYTES: usize = 25 << 20;

/// Divides the gradients of the tensors that train, each with its bytes, into buckets in the order in which a backward
/// pass finishes them: the head and the norm before it, the layers from the last to the first, the embedding. It is the
/// order of all ranks, as it depends on what trains alone. A tensor of more than `most_bytes` is a bucket of its own.
pub fn buckets(gradients: impl Iterator<Item = (ParamId, usize)>, most_bytes: usize) -> Vec<Vec<ParamId>> {
    let mut gradients: Vec<(ParamId, usize)> = gradients.collect();
    gradients.sort_by_key(|(id, _)| (stage(*id), *id));
    let (mut buckets, mut open_bytes): (Vec<Vec<ParamId>>, usize) = (Vec::new(), 0);
    for (id, bytes) in gradients {
        open_bytes = open_bytes.saturating_add(bytes);
        match buckets.last_mut().filter(|_| open_bytes <= most_bytes) {
            Some(open) => open.push(id),
            None => {
                buckets.push(vec![id]);
                open_bytes = bytes;
            }
        }
    }
    buckets
}

/// When the gradient of a tensor is final, in comparison with others.
fn stage(id: ParamId) -> (u8, std::cmp::Reverse<usize>) {
    let part = match id {
        ParamId::Head | ParamId::FinalNorm => 0,
        ParamId::Embedding => 2,
        _ => 1,
    };
    (part, std::cmp::Reverse(id.layer().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modules::{ModuleId, ModuleKind};

    #[test]
    fn the_order_is_that_of_the_backward_pass() {
        let down = |layer| ParamId::Weight(ModuleId { layer, kind: ModuleKind::Down });
        let sizes = [
            (ParamId::Embedding, 50),
            (down(0), 6),
            (ParamId::InputNorm(0), 1),
            (down(1), 6),
            (down(2), 6),
            (ParamId::FinalNorm, 1),
            (ParamId::Head, 5),
        ];
        let found = buckets(sizes.into_iter(), 12);
        let expected = [
            vec![ParamId::FinalNorm, ParamId::Head, down(2)],
            vec![down(1), ParamId::InputNorm(0)],
            vec![down(0)],
            vec![ParamId::Embedding],
        ];
        // 1 + 5 + 6 fill a bucket of 12; 6 + 1 leave no room for 6.
        assert_eq!(found, expected);
        assert_eq!(buckets(sizes.into_iter(), usize::MAX).len(), 1);
        assert_eq!(buckets(sizes.into_iter(), 0).len(), sizes.len());
        assert!(buckets(std::iter::empty(), 12).is_empty());
    }
}
