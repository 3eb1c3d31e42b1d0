//! Gradients are sent to the other ranks while the backward pass goes on.

use crate::run::{bits, examples, model, options, two_phases};
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::sync::{Condvar, Mutex};
use std::time::Duration;
use swat::backend::ViewMut;
use swat::backend::cpu::Cpu;
use swat::backend::trace::{self, Recording, Span, SpanKind};
use swat::data::Loader;
use swat::error::{Error, Result};
use swat::group::{Bucket, Group, Hosted, Place, ReduceScatter, Share, Tcp, Threads, Traffic, Transport};
use swat::modules::ParamId;
use swat::train::{Phase, Tuner};

/// Less than any two tensors of a layer, so that a step has many buckets.
const BUCKET_BYTES: usize = 4 << 10;
/// Time for a message that is sent at once, on a machine that is busy.
const SOON: Duration = Duration::from_secs(60);

/// Counts the exchanges that it has begun.
struct Counting<T> {
    inner: Hosted<T>,
    /// `usize::MAX` once one has failed.
    exchanged: Mutex<usize>,
    changed: Condvar,
}

impl<T: Transport> Transport for Counting<T> {
    fn share(&self) -> Share {
        self.inner.transport().share()
    }

    fn exchange(&self, messages: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        *self.exchanged.lock().unwrap() += 1;
        self.changed.notify_all();
        let received = self.inner.transport().exchange(messages);
        if received.is_err() {
            *self.exchanged.lock().unwrap() = usize::MAX;
            self.changed.notify_all();
        }
        received
    }
}

/// A group that goes on with the backward pass only when the buckets before were sent.
struct Watched<T> {
    group: Hosted<Counting<T>>,
    /// Where set, this bucket of the first step fails.
    fails_at: Option<usize>,
}

impl<T: Transport> Watched<T> {
    fn new(inner: Hosted<T>, fails_at: Option<usize>) -> Self {
        let (exchanged, changed) = (Mutex::default(), Condvar::new());
        Self { group: Hosted::new(Counting { inner, exchanged, changed }), fails_at }
    }

    fn cpu(&self) -> &dyn Group<Cpu> {
        &self.group
    }
}

impl<T: Transport> Group<Cpu> for Watched<T> {
    fn share(&self) -> Share {
        self.cpu().share()
    }
    fn all_reduce(&self, values: &mut [f64]) -> Result<()> {
        self.cpu().all_reduce(values)
    }
    fn reduce_scatter(&self, backend: &Cpu) -> Result<Box<dyn ReduceScatter<Cpu> + '_>> {
        let transport = self.group.transport();
        Ok(Box::new(Step {
            sums: self.cpu().reduce_scatter(backend)?,
            before: *transport.exchanged.lock().unwrap(),
            transport,
            begun: 0,
            fails_at: self.fails_at,
            recording: trace::record().expect("nothing else records"),
            passes: 0,
            passes_before: 0,
        }))
    }
    fn all_gather(&self, backend: &Cpu, tensors: &mut [ViewMut<'_, Cpu, f32>]) -> Result<()> {
        self.cpu().all_gather(backend, tensors)
    }
    fn exchange(&self, messages: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        self.cpu().exchange(messages)
    }
    fn traffic(&self) -> Traffic {
        self.cpu().traffic()
    }
}

/// The sums of a step.
struct Step<'g, T> {
    sums: Box<dyn ReduceScatter<Cpu> + 'g>,
    transport: &'g Counting<T>,
    /// Exchanges before the step.
    before: usize,
    begun: usize,
    fails_at: Option<usize>,
    recording: Recording,
    /// Backward passes of layer 0 that are over; the last one of a step comes behind the first bucket.
    passes: usize,
    passes_before: usize,
}

impl<T> Step<'_, T> {
    fn look(&mut self) {
        let of_layer_0 = |span: &Span| (span.kind, span.phase, span.layer) == (SpanKind::Layer, "backward", Some(0));
        self.passes += self.recording.take().into_iter().filter(of_layer_0).count();
    }
}

impl<T> ReduceScatter<Cpu> for Step<'_, T> {
    fn begin(&mut self, bucket: Bucket<Cpu>) -> Result<()> {
        self.look();
        if self.begun == 0 {
            self.passes_before = self.passes;
        }
        if self.fails_at == Some(self.begun) {
            return Err(Error::failed("no memory", "buy some"));
        }
        self.sums.begin(bucket)?;
        self.begun += 1;
        let sent = self.transport.exchanged.lock().unwrap();
        let unsent = |exchanged: &mut usize| *exchanged < self.before + self.begun;
        let (_sent, late) = self.transport.changed.wait_timeout_while(sent, SOON, unsent).unwrap();
        assert!(!late.timed_out(), "bucket {} is not sent while the backward pass waits", self.begun);
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<Vec<Bucket<Cpu>>> {
        self.look();
        assert!(self.begun > 2, "{} buckets", self.begun);
        assert_eq!(self.passes, self.passes_before + 1, "layer 0 was done before the first bucket was sent");
        self.sums.finish()
    }
}

fn phases() -> Vec<Phase> {
    two_phases(0, 3)
}

fn train(group: &dyn Group<Cpu>, bucket_bytes: Option<usize>) -> Result<BTreeMap<ParamId, Vec<u32>>> {
    let mut decoder = model();
    let options = swat::train::TuneOptions { batch_size: 5, grad_accum: 2, ..options() };
    let mut loader = Loader::new(examples(23), options.loader())?;
    let tuner = Tuner::new(&mut decoder, &mut loader, options, phases())?.group(group);
    let tuner = match bucket_bytes {
        Some(bytes) => tuner.bucket_bytes(bytes),
        None => tuner,
    };
    tuner.run(&mut ())?;
    Ok(bits(&decoder))
}

/// What each rank returns, which has its group for itself.
fn each<G: Send, R: Send>(groups: Vec<G>, rank: impl Fn(usize, G) -> R + Sync) -> Vec<R> {
    let rank = &rank;
    std::thread::scope(|scope| {
        let ranks = groups.into_iter().enumerate().map(|(i, group)| scope.spawn(move || rank(i, group)));
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn over_tcp(size: usize) -> Vec<Hosted<Tcp>> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    each((0..size).collect(), |rank, _| {
        let share = Share { rank, size };
        let host = "127.0.0.1".to_owned();
        let place = Place { share, local_rank: rank, local_size: size, host, port, job: String::new() };
        Tcp::join(&place, "test", SOON, |_| {}).unwrap()
    })
}

#[test]
fn buckets_are_sent_while_the_backward_pass_goes_on() {
    // One bucket, which nothing hides.
    let whole = each(Threads::groups(3), |_, group| train(&group, None).unwrap());
    let threads = each(Threads::groups(3), |_, group| train(&Watched::new(group, None), Some(BUCKET_BYTES)).unwrap());
    let tcp = each(over_tcp(3), |_, group| {
        let tcp = group.transport().clone();
        let done = train(&Watched::new(group, None), Some(BUCKET_BYTES)).unwrap();
        tcp.end(None);
        done
    });
    for (rank, whole) in whole.iter().enumerate() {
        assert!(threads[rank] == *whole, "rank {rank}, threads: other weights than with one bucket");
        assert!(tcp[rank] == *whole, "rank {rank}, TCP: other weights than with one bucket");
    }
}

#[test]
fn a_rank_that_fails_in_a_backward_pass_ends_the_others() {
    let fails = |rank: usize| (rank == 1).then_some(2);
    let errors = each(Threads::groups(3), |rank, group| {
        train(&Watched::new(group, fails(rank)), Some(BUCKET_BYTES)).unwrap_err().to_string()
    });
    assert!(errors[1].contains("no memory"), "{errors:?}");
    assert!([0, 2].iter().all(|rank| errors[*rank].contains("has ended")), "{errors:?}");

    let errors = each(over_tcp(3), |rank, group| {
        let tcp = group.transport().clone();
        let error = train(&Watched::new(group, fails(rank)), Some(BUCKET_BYTES)).unwrap_err();
        tcp.end(Some(&error));
        error.to_string()
    });
    assert!(errors[1].contains("no memory"), "{errors:?}");
    for rank in [0, 2] {
        assert!(errors[rank].contains("rank 1 has ended: no memory"), "rank {rank}: {}", errors[rank]);
    }
}
