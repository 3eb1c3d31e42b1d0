//! Sums and exchanges alone, between threads with a device each, against whole numbers added up by hand.

use crate::common::standin::{self, BUILD};
use crate::{WITHIN, meet, port};
use half::bf16;
use std::ops::Range;
use std::time::Duration;
use swat::backend::cuda::{Bf16State, Cuda, F32State, Precision};
use swat::backend::{Backend, Buffer, Element, FloatElement};
use swat::group::{Group, Nccl, Place, Share, Traffic};

/// Shorter than a part's alignment; with empty parts and with one that is half of another; parts of one size.
const LENGTHS: [usize; 10] = [1, 7, 8, 12, 50, 63, 512, 1000, 4096, 12_345];
/// Elements before and behind a tensor that nobody may touch.
const AROUND: usize = 8;

pub fn place(rank: usize, size: usize, port: u16) -> Place {
    let share = Share { rank, size };
    Place { share, local_rank: rank, local_size: 1, host: "127.0.0.1".into(), port, job: String::new() }
}

/// What each rank of a group returns; `None` without a stand-in.
fn each_rank<P: Precision, R: Send>(size: usize, work: impl Fn(&Cuda<P>, &Nccl) -> R + Sync) -> Option<Vec<R>> {
    if !BUILD.with_nccl() {
        return None;
    }
    let (port, work) = (port(), &work);
    let rank = move |rank: usize| {
        let hosts = meet(&place(rank, size, port)).unwrap();
        let tcp = hosts.transport().clone();
        let cuda = Cuda::open(rank as u32 % 4).unwrap();
        let group = Nccl::join(hosts, &cuda, WITHIN).unwrap();
        let result = work(&cuda, &group);
        tcp.end(None);
        result
    };
    Some(std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..size).map(|of| scope.spawn(move || rank(of))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    }))
}

/// From −15 to 15: sums of 8 ranks are exact in bf16, in any order.
fn value(rank: usize, tensor: usize, i: usize) -> f32 {
    ((i * 7 + tensor * 3 + rank * 11) % 31) as f32 - 15.0
}

/// Tensors on the device, by work that the device still has to do when this returns.
fn tensors<B: Backend, T: FloatElement>(backend: &B, value: impl Fn(usize, usize) -> f32) -> Vec<Buffer<B, T>> {
    let tensor = |(tensor, len): (usize, &usize)| {
        let inside = (0..*len).map(|i| value(tensor, i));
        let around = [f32::MAX; AROUND];
        let values: Vec<T> = around.into_iter().chain(inside).chain(around).map(T::from_f32).collect();
        let mut first = backend.zeros(values.len()).unwrap();
        let mut second = backend.zeros(values.len()).unwrap();
        backend.write(&values, first.view_mut()).unwrap();
        backend.copy(first.view(), second.view_mut()).unwrap();
        second
    };
    LENGTHS.iter().enumerate().map(tensor).collect()
}

/// One of them alone, with nothing around it.
fn gradient<B: Backend>(backend: &B, len: usize, value: impl Fn(usize) -> f32) -> Buffer<B, B::Grad> {
    let values: Vec<B::Grad> = (0..len).map(value).map(B::Grad::from_f32).collect();
    let (mut first, mut second) = (backend.zeros(len).unwrap(), backend.zeros(len).unwrap());
    backend.write(&values, first.view_mut()).unwrap();
    backend.copy(first.view(), second.view_mut()).unwrap();
    second
}

fn read<B: Backend, T: FloatElement>(backend: &B, buffer: &Buffer<B, T>) -> Vec<f32> {
    let mut values = vec![T::zeroed(); buffer.len()];
    backend.read(buffer.view(), &mut values).unwrap();
    values.into_iter().map(T::to_f32).collect()
}

/// A tensor's elements without those around it, which are as they were.
fn inside<B: Backend, T: FloatElement>(backend: &B, buffer: &Buffer<B, T>) -> Vec<f32> {
    let values = read(backend, buffer);
    let (before, rest) = values.split_at(AROUND);
    let (inside, behind) = rest.split_at(rest.len() - AROUND);
    let untouched = T::from_f32(f32::MAX).to_f32();
    assert!(before.iter().chain(behind).all(|x| *x == untouched), "a neighbour was written to");
    inside.to_vec()
}

fn sums_and_parts<P: Precision>(cuda: &Cuda<P>, group: &Nccl) {
    let share = Group::<Cuda<P>>::share(group);
    let name = format!("rank {} of {}, {} gradients", share.rank, share.size, P::Grad::NAME);
    let of_rank = |rank: usize| Share { rank, ..share };
    for _ in 0..3 {
        // Two buckets, the second of which is written while the first is under way.
        let gradients = |of: Range<usize>| {
            let gradients = of.map(|tensor| gradient(cuda, LENGTHS[tensor], |i| value(share.rank, tensor, i)));
            gradients.collect::<Vec<_>>()
        };
        let mut sums = group.reduce_scatter(cuda).unwrap();
        sums.begin(gradients(0..4)).unwrap();
        sums.begin(gradients(4..LENGTHS.len())).unwrap();
        let buckets = sums.finish().unwrap();
        assert_eq!((buckets.len(), buckets[0].len()), (2, 4));
        for (tensor, gradient) in buckets.into_iter().flatten().enumerate() {
            let found = read(cuda, &gradient);
            assert_eq!(found.len(), LENGTHS[tensor]);
            for i in share.of(found.len()) {
                let sum: f32 = (0..share.size).map(|rank| value(rank, tensor, i)).sum();
                assert_eq!(found[i], sum, "{name}: element {i} of {}", found.len());
            }
        }
        // Other parts hold what must not be seen afterwards.
        let stale = |tensor: usize, i: usize| match share.of(LENGTHS[tensor]).contains(&i) {
            true => value(share.rank, tensor, i),
            false => f32::NAN,
        };
        let mut weights = tensors::<_, bf16>(cuda, stale);
        let range = |tensor: usize| AROUND..AROUND + LENGTHS[tensor];
        let views = weights.iter_mut().enumerate().map(|(tensor, buffer)| buffer.range_mut(range(tensor)));
        group.all_gather(cuda, &mut views.collect::<Vec<_>>()).unwrap();
        for (tensor, weight) in weights.iter().enumerate() {
            let found = inside(cuda, weight);
            for owner in 0..share.size {
                for i in of_rank(owner).of(found.len()) {
                    assert_eq!(found[i], value(owner, tensor, i), "{name}: element {i} of {}", found.len());
                }
            }
        }
    }
    let step = Traffic::of_step::<Cuda<P>>(LENGTHS.into_iter(), share);
    let found = Group::<Cuda<P>>::traffic(group);
    assert_eq!(found.reduce_scatter_bytes, 3 * step.reduce_scatter_bytes, "{name}");
    assert_eq!(found.all_gather_bytes, 3 * step.all_gather_bytes, "{name}");
    let mut numbers = [1.5, share.rank as f64];
    Group::<Cuda<P>>::all_reduce(group, &mut numbers).unwrap();
    assert_eq!(numbers, [1.5 * share.size as f64, (0..share.size).sum::<usize>() as f64]);
}

#[test]
fn sums_and_parts_are_those_by_hand() {
    for (seed, size) in [(0, 1), (1, 2), (2, 3), (3, 4), (4, 8), (0, 3)] {
        if !BUILD.with_nccl() {
            return;
        }
        standin::streams(seed);
        each_rank::<F32State, _>(size, sums_and_parts);
        each_rank::<Bf16State, _>(size, sums_and_parts);
    }
    standin::streams(0);
}

/// The sum of a part in bf16 is rounded after each addition, as NCCL does, and in f32 it is not.
#[test]
fn bf16_gradients_are_rounded_at_each_addition() {
    // 256 + 1 + 1: each 1 is lost, a half of the last place that rounds to even.
    fn sum<P: Precision>(cuda: &Cuda<P>, group: &Nccl) -> f32 {
        let rank = Group::<Cuda<P>>::share(group).rank;
        let mut sums = group.reduce_scatter(cuda).unwrap();
        sums.begin(vec![gradient(cuda, 24, |_| if rank == 1 { 256.0 } else { 1.0 })]).unwrap();
        read(cuda, &sums.finish().unwrap()[0][0])[8 * rank]
    }
    let Some(found) = each_rank::<F32State, _>(3, sum) else { return };
    assert_eq!(found, [258.0; 3]);
    let found = each_rank::<Bf16State, _>(3, sum).unwrap();
    // The ring of rank 0's part begins with 256; that of rank 1's ends with it, behind 1 + 1.
    assert_eq!(found, [256.0, 258.0, 256.0]);
}

/// All others have said hello, and one of them never connects.
#[test]
fn a_rank_that_does_not_connect_is_reported_in_time() {
    if !BUILD.with_nccl() {
        return;
    }
    let (port, began) = (port(), std::time::Instant::now());
    let late = std::thread::spawn(move || {
        let hosts = meet(&place(1, 2, port)).unwrap();
        let hello = br#"{"nccl":{"Ok":"2.24.3"},"id":[]}"#.to_vec();
        Group::<Cuda>::exchange(&hosts, vec![hello; 2]).unwrap();
        // Until the other has given up.
        let _ = Group::<Cuda>::exchange(&hosts, vec![Vec::new(); 2]);
    });
    let hosts = meet(&place(0, 2, port)).unwrap();
    let cuda = Cuda::<F32State>::open(0).unwrap();
    let error = Nccl::join(hosts, &cuda, Duration::from_secs(2)).err().unwrap().to_string();
    assert!(error.contains("rank 0: NCCL cannot connect within 2 s"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(30));
    late.join().unwrap();
}
