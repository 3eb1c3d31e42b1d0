//! What a GPU is given to do between the sums of two buckets: the next part of the backward pass, as a graph.

use crate::collectives::place;
use crate::common::standin::{self, BUILD};
use crate::common::{self, config};
use crate::{WITHIN, meet, port};
use std::sync::Mutex;
use swat::backend::ViewMut;
use swat::backend::cuda::{Cuda, F32State};
use swat::data::{Example, Loader};
use swat::error::Result;
use swat::group::{Alone, Bucket, Group, Nccl, ReduceScatter, Share, Traffic};
use swat::modules::LearningRates;
use swat::train::{Phase, PhaseOptions, TuneOptions, Tuner};

type Gpu = Cuda<F32State>;

/// The device that no other test of this executable uses, so that its calls can be counted.
const ORDINAL: i32 = 5;
/// After the first steps all allocations are those of the step before, and the graphs exist.
const STEPS: u64 = 12;

const GRAPH_LAUNCH: &str = "cuGraphLaunch";
const LAUNCH: &str = "cuLaunchKernel";

/// Graphs and kernels launched so far.
fn launched() -> [u64; 2] {
    [GRAPH_LAUNCH, LAUNCH].map(|name| standin::calls(ORDINAL, name))
}

/// Counts what was launched when a step began, and before each bucket.
struct Counting<'a> {
    group: &'a Nccl,
    steps: Mutex<Vec<Vec<[u64; 2]>>>,
}

impl<'a> Counting<'a> {
    fn inner(&self) -> &'a dyn Group<Gpu> {
        self.group
    }
}

impl Group<Gpu> for Counting<'_> {
    fn share(&self) -> Share {
        self.inner().share()
    }
    fn all_reduce(&self, values: &mut [f64]) -> Result<()> {
        self.inner().all_reduce(values)
    }
    fn reduce_scatter(&self, backend: &Gpu) -> Result<Box<dyn ReduceScatter<Gpu> + '_>> {
        self.steps.lock().unwrap().push(vec![launched()]);
        Ok(Box::new(Step { sums: self.inner().reduce_scatter(backend)?, steps: &self.steps }))
    }
    fn all_gather(&self, backend: &Gpu, tensors: &mut [ViewMut<'_, Gpu, half::bf16>]) -> Result<()> {
        self.inner().all_gather(backend, tensors)
    }
    fn exchange(&self, messages: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        self.inner().exchange(messages)
    }
    fn traffic(&self) -> Traffic {
        self.inner().traffic()
    }
}

struct Step<'a> {
    sums: Box<dyn ReduceScatter<Gpu> + 'a>,
    steps: &'a Mutex<Vec<Vec<[u64; 2]>>>,
}

impl ReduceScatter<Gpu> for Step<'_> {
    fn begin(&mut self, bucket: Bucket<Gpu>) -> Result<()> {
        self.sums.begin(bucket)?;
        self.steps.lock().unwrap().last_mut().expect("a step").push(launched());
        Ok(())
    }
    fn finish(self: Box<Self>) -> Result<Vec<Bucket<Gpu>>> {
        self.sums.finish()
    }
}

/// The weights after steps of one shape.
fn train(cuda: &Gpu, group: &dyn Group<Gpu>) -> Vec<Vec<f32>> {
    let config = config(2, false, false, true);
    let mut decoder = common::decoder_on(cuda, &config, 7);
    let options = TuneOptions { batch_size: 2, max_length: 32, ..TuneOptions::default() };
    let example = |i: u32| {
        let tokens = (0..9).map(|t| (i * 7 + t * 5) % 61).collect();
        Example { tokens, trained: (0..9).map(|t| t >= 3).collect(), replayed: false }
    };
    let examples: Vec<Example> = (0..8).map(example).collect();
    let mut loader = Loader::new(examples, options.loader()).unwrap();
    let all = config.cells();
    let phase = Phase {
        name: "all".into(),
        rates: LearningRates::masked(&all, &all, 0.0),
        options: PhaseOptions { lr: 1e-3, steps: Some(STEPS), ..PhaseOptions::default() },
    };
    let tuner = Tuner::new(&mut decoder, &mut loader, options, vec![phase]).unwrap().group(group);
    tuner.bucket_bytes(4 << 10).run(&mut ()).unwrap();
    decoder.params().iter().map(|param| decoder.read(param.id).unwrap()).collect()
}

#[test]
fn the_backward_pass_is_a_graph_for_each_bucket() {
    if !BUILD.with_nccl() {
        return;
    }
    let cuda = Gpu::open(ORDINAL as u32).unwrap();
    let alone = train(&cuda, &Alone);
    let hosts = meet(&place(0, 1, port())).unwrap();
    let tcp = hosts.transport().clone();
    let counting = Counting { group: &Nccl::join(hosts, &cuda, WITHIN).unwrap(), steps: Mutex::default() };
    assert!(train(&cuda, &counting) == alone, "other weights than with one graph");
    tcp.end(None);
    let steps = counting.steps.into_inner().unwrap();
    assert_eq!(steps.len() as u64, STEPS);
    let buckets = steps[0].len() - 1;
    for step in &steps[STEPS as usize - 3..] {
        // Graphs that were launched before a bucket, since the one before: one, or none where a layer has ended both.
        let graphs: Vec<u64> = step.windows(2).map(|pair| pair[1][0] - pair[0][0]).collect();
        assert!(graphs.len() == buckets && graphs[0] == 1 && graphs.iter().all(|count| *count <= 1), "{graphs:?}");
        // With the head, after each of two layers, and with the embedding.
        assert_eq!(graphs.iter().sum::<u64>(), 4, "{graphs:?}");
        assert!(step.iter().all(|[_, kernels]| *kernels == step[0][1]), "no kernel by itself: {step:?}");
    }
    // The first bucket does not wait for the layers, also where there are no graphs yet.
    let kernels: Vec<u64> = steps[0].iter().map(|[_, kernels]| *kernels).collect();
    assert!(kernels[1] > kernels[0] && kernels[buckets] > kernels[1] + 20, "{kernels:?}");
}
