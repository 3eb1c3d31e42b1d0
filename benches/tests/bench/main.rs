//! The bench framework's own arithmetic and clocks: intervals against known cases, kernels of known duration on the
//! stand-in GPU, and every ladder of every family once, at tiny sizes.

mod cublaslt;
mod standin;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use swat::backend::Roofline;
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Cuda, F32State};
use swat::backend::{Backend, Buffer, Cost, Operator, SwiGlu};
use swat_bench::FAMILIES;
use swat_bench::common::ladder::{Ladder, verdict};
use swat_bench::common::roofline::{Measured, table};
use swat_bench::common::session::{Choice, Mode};
use swat_bench::common::stats::{median, median_interval, quantile};
use swat_bench::common::{Device, Scale, Session, random};

/// A session that samples everything, at tiny sizes.
fn session(family: &'static str) -> Session {
    Session::new(family, Mode::Json(Choice::default()), Scale::tiny())
}

#[test]
fn every_ladder_runs_on_the_cpu() {
    for family in FAMILIES {
        let mut session = session(family.name);
        (family.cpu)(&mut session, &Cpu::new());
        let names: Vec<_> = session.measured.iter().map(|m| m.variant.as_str()).collect();
        assert!(names.contains(&"swat"), "{}: {names:?}", family.name);
        assert!(session.measured.iter().all(|m| m.ns() > 0.0), "{}", family.name);
    }
}

#[test]
fn every_ladder_runs_on_a_gpu() {
    let _turn = exclusive();
    let Some(cuda) = standin::open(0) else { return };
    every_ladder(&cuda);
}

fn every_ladder(cuda: &Cuda<F32State>) {
    known_clock(0, 5_000_000);
    for family in FAMILIES {
        let mut session = session(family.name);
        (family.cuda)(&mut session, cuda);
        let names: Vec<_> = session.measured.iter().map(|m| m.variant.as_str()).collect();
        assert!(names.contains(&"swat"), "{}: {names:?}", family.name);
        let laddered = family.name == "engine" || names.contains(&"baseline");
        assert!(laddered, "{} shows no baseline: {names:?}", family.name);
    }
    known_clock(0, 0);
}

/// Which ids are chosen, and which families are skipped as a whole.
#[test]
fn choices() {
    let choice = |parts: &[&str], variants: &[&str]| {
        let owned = |names: &[&str]| names.iter().map(|name| String::from(*name)).collect();
        Choice { parts: owned(parts), variants: owned(variants) }
    };
    let id = "gemm/forward/m/1x2x3";
    for (parts, variants, taken) in [
        (&[][..], &[][..], true),
        (&["gemm/forward"], &[], true),
        (&["backward", "1x2"], &["swat", "wgmma"], true),
        (&["forward"], &["wgmma"], false),
        (&["forward"], &["swa"], false),
        (&["backward"], &["swat"], false),
    ] {
        assert_eq!(choice(parts, variants).takes(id, "swat"), taken, "{parts:?} {variants:?}");
    }
    let names: Vec<_> = FAMILIES.iter().map(|family| family.name).collect();
    for (parts, wanted) in [(&[][..], true), (&["gemm"], true), (&["rope/forward"], false), (&["rope", "7b"], true)] {
        assert_eq!(choice(parts, &[]).wants("gemm", &names), wanted, "{parts:?}");
    }
}

/// `--once` calls twice, the second time within the profiler's range.
#[test]
fn once_runs_within_a_profiler_range() {
    let _turn = exclusive();
    let Some(cuda) = standin::open(1) else { return };
    if standin::real() {
        return;
    }
    let mut session = Session::new("clock", Mode::Once(Choice::default()), Scale::tiny());
    let (calls, cost) = (std::cell::Cell::new(0), Cost { bytes: 512, flops: 0 });
    let make = |cuda: &Cuda<F32State>| [(); 3].map(|()| random::<_, half::bf16>(cuda, 64));
    let ladder = session.ladder(&cuda, "swiglu", "64", cost, make).variant("swat", |cuda, [gate, up, y]| {
        calls.set(calls.get() + 1);
        SwiGlu { gate: gate.view(), up: up.view(), y: y.view_mut() }.run(cuda).unwrap();
    });
    let before = [standin::launches(1), standin::profiled(1)];
    ladder.run();
    let [launched, profiled] = [standin::launches(1) - before[0], standin::profiled(1) - before[1]];
    assert_eq!((calls.get(), launched, profiled), (2, 2 * profiled, profiled));
    assert!(profiled > 0 && session.measured.is_empty());
}

/// Kernels whose accesses may take more than the minimum: prefix, factor, reason.
const WIDER: [(&str, f64, &str); 7] = [
    ("gemm_tn_decode", 1.15, "outputs of few rows, an element a row; the weight, of few columns here, is what counts"),
    ("gemm_tn_each_decode", 1.15, "the same"),
    ("perturb_low_rank_vec8_bf16", 1.4, "the factors, 32 bytes a lane in two accesses: the second finds them in L1"),
    ("rmsnorm_backward_row", 1.2, "partial sums of dweight in the same way, once a part; parts have few rows here"),
    ("rope_forward_vec8_bf16", 1.4, "the angles in the same way, for four heads"),
    ("attention_backward_", 1.05, "D lies by heads"),
    ("cross_entropy_terms_vec8_bf16", 1.2, "logits of the teacher's tokens, a sector for each; rows are short here"),
];

/// Compiled kernels access global memory in full sectors, and shared memory without bank conflicts. Baselines and the
/// fallbacks for unaligned data are exempt.
#[test]
fn accesses() {
    if !standin::compiled() {
        return standin::BUILD.test_compiled(&["--exact", "accesses"]);
    }
    let Some(cuda) = standin::open(0) else { return };
    every_ladder(&cuda);
    let mut kernels: BTreeMap<_, Vec<_>> = BTreeMap::new();
    let accesses = standin::accesses();
    assert!(accesses.iter().any(|access| access.shared) && accesses.iter().any(|access| !access.shared));
    for access in accesses.into_iter().filter(|a| !a.kernel.contains("baseline") && !a.kernel.contains("scalar")) {
        kernels.entry((access.kernel.clone(), access.shared)).or_default().push(access);
    }
    let mut wrong = String::new();
    for ((kernel, shared), mut accesses) in kernels {
        let sum = |of: fn(&standin::Access) -> u64| accesses.iter().map(of).sum::<u64>() as f64;
        let times = sum(|a| a.moved) / sum(|a| a.needed);
        let wider = WIDER.iter().find(|(prefix, ..)| !shared && kernel.starts_with(prefix));
        if times <= wider.map_or(1.02, |(_, most, _)| *most) {
            continue;
        }
        wrong += &format!(
            "{kernel}: {times:.3} times what it needs of {} memory\n",
            ["global", "shared"][usize::from(shared)]
        );
        accesses.sort_by_key(|a| a.needed as i64 - a.moved as i64);
        for a in accesses.iter().take(4) {
            wrong += &format!("  {}: {} requests took {}, needed {}\n", a.place, a.requests, a.moved, a.needed);
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

/// Serializes tests: the clock of a stand-in's device belongs to the process.
fn exclusive() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Fixes the duration of each kernel on the stand-in; a real GPU keeps its own clock.
fn known_clock(ordinal: i32, ns: u64) {
    if !standin::real() {
        standin::each_takes(ordinal, ns);
    }
}

#[test]
fn quantiles_are_between_neighbours() {
    let samples = [5.0, 1.0, 3.0, 2.0, 4.0];
    assert_eq!(median(&samples), 3.0);
    assert_eq!([quantile(&samples, 0.0), quantile(&samples, 1.0)], [1.0, 5.0]);
    assert!((quantile(&samples, 0.1) - 1.4).abs() < 1e-12);
    assert_eq!(median(&[1.0, 2.0]), 1.5);
    assert_eq!(median(&[7.0]), 7.0);
    assert!(median(&[]).is_nan());
}

/// Ranks from the tables of the sign test (Dixon and Mood 1946): n, and the rank from both ends.
#[test]
fn intervals_have_the_ranks_of_the_sign_test() {
    for (n, rank) in [(6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (15, 4), (20, 6), (25, 8), (41, 14), (100, 40)] {
        let samples: Vec<f64> = (1..=n).rev().map(f64::from).collect();
        let [low, high] = median_interval(&samples);
        assert_eq!([low, high], [f64::from(rank), f64::from(n + 1 - rank)], "{n} samples");
    }
    assert_eq!(median_interval(&[3.0, 1.0]), [1.0, 3.0]);
    assert!(median_interval(&[]).iter().all(|end| end.is_nan()));
}

/// Over many draws at least 95 % of the intervals contain the true median, but not nearly all.
#[test]
fn intervals_contain_the_median_as_often_as_stated() {
    let mut rng = swat::rng::Philox::new(5, 0);
    let held = (0..4000).filter(|_| {
        let samples: Vec<f64> = (0..20).map(|_| rng.normal().exp()).collect();
        let [low, high] = median_interval(&samples);
        (low..=high).contains(&1.0)
    });
    let share = held.count() as f64 / 4000.0;
    // By the binomial distribution 95.86 %; four standard errors are 1.3 %.
    assert!((0.945..0.972).contains(&share), "{share}");
}

#[test]
fn a_verdict_needs_an_interval_without_1() {
    let names = ["a".to_string(), "b".to_string()];
    let about = |centre: f64| -> Vec<f64> { (0..21).map(|i| centre + 0.001 * f64::from(i - 10)).collect() };
    assert!(verdict(&names, &about(1.1)).ends_with("a is faster"));
    assert!(verdict(&names, &about(0.9)).ends_with("b is faster"));
    let same = verdict(&names, &about(1.0));
    assert!(same.ends_with("not told apart") && same.contains("1.000"), "{same}");
}

#[test]
fn the_table_names_the_limiting_resource_and_the_best_peer() {
    let ceilings = Roofline { flops_per_s: 1e15, bytes_per_s: 1e12 };
    let measured = |variant: &str, peer, ns, bytes, flops| Measured {
        family: "gemm",
        op: "forward".into(),
        shape: "m/1x1".into(),
        variant: variant.into(),
        peer,
        samples: vec![ns; 5],
        cost: Cost { bytes, flops },
    };
    // 1000 bytes take 1 ns, 10⁷ FLOPs 10 ns.
    let by_memory = measured("swat", false, 4.0, 1000, 1000);
    assert!((by_memory.of_ceiling(&ceilings) - 0.25).abs() < 1e-12);
    let by_compute = measured("swat", false, 20.0, 1000, 10_000_000);
    assert!((by_compute.of_ceiling(&ceilings) - 0.5).abs() < 1e-12);
    assert!((by_compute.tflop_per_s() - 500.0).abs() < 1e-9 && (by_compute.gb_per_s() - 50.0).abs() < 1e-9);
    let slow = measured("slow", true, 40.0, 1000, 1000);
    let all = [by_memory.clone(), slow, measured("fast", true, 6.0, 1000, 1000)];
    assert_eq!(by_memory.of_best_peer(&all), Some(1.5));
    assert_eq!(by_memory.of_best_peer(&all[..1]), None);
    let text = table(&all, "a device", &ceilings, "swat").text();
    assert!(text.contains("fast (peer)") && text.contains("1.50"), "{text}");
}

/// Source and destination of a copy.
type Pair<D> = [Buffer<D, f32>; 2];

fn pair<D: Device>(d: &D) -> Pair<D> {
    [random(d, 64), random(d, 64)]
}

fn copy<D: Device>(d: &D, [from, to]: &mut Pair<D>) {
    d.copy(from.view(), to.view_mut()).unwrap();
}

/// A ladder with a variant of one copy and a variant of two.
fn with_copies<D: Device, R>(device: &D, f: impl FnOnce(&mut Ladder<'_, D, Pair<D>>) -> R) -> R {
    let mut session = session("clock");
    let cost = Cost { bytes: 512, flops: 0 };
    let ladder = session.ladder(device, "copy", "64", cost, pair).variant("one", copy);
    let mut ladder = ladder.variant("two", |d, tensors| {
        copy(d, tensors);
        copy(d, tensors);
    });
    f(&mut ladder)
}

#[test]
fn work_of_known_duration_is_timed_right() {
    let _turn = exclusive();
    let Some(cuda) = standin::open(0) else { return };
    if standin::real() {
        return;
    }
    // Short enough to be captured, not, and long enough to need nothing queued before it.
    for ns in [20_000, 400_000, 6_000_000] {
        known_clock(0, ns);
        with_copies(&cuda, |ladder| {
            for (at, copies) in [(0, 1), (1, 2)] {
                let samples = ladder.samples(at);
                assert!(samples.len() >= 7, "{ns}: {samples:?}");
                // Events tell milliseconds as f32.
                let exact = (ns * copies) as f64;
                assert!(samples.iter().all(|sample| (sample / exact - 1.0).abs() < 1e-4), "{exact}: {samples:?}");
            }
            let ratios = ladder.ratios([0, 1]);
            assert!(ratios.iter().all(|ratio| (ratio - 2.0).abs() < 1e-3), "{ratios:?}");
        });
    }
    known_clock(0, 0);
}

#[test]
fn captured_work_runs_on_replay() {
    let Some(cuda) = standin::open(1) else { return };
    let [from, mut to] = pair(&cuda);
    let mut copied = false;
    // SAFETY: both buffers outlive it, and a copy needs no workspace.
    let captured = unsafe {
        cuda.capture(|| {
            copied = true;
            cuda.copy(from.view(), to.view_mut())
        })
    };
    let (captured, mut before, mut after) = (captured.unwrap(), [0f32; 64], [0f32; 64]);
    let mut expected = [0f32; 64];
    cuda.read(to.view(), &mut before).unwrap();
    cuda.read(from.view(), &mut expected).unwrap();
    assert!(copied && before != expected, "nothing runs while it is captured");
    captured.launch().unwrap();
    cuda.read(to.view(), &mut after).unwrap();
    assert_eq!(after, expected);
    // SAFETY: nothing is captured.
    let refused = unsafe { cuda.capture(|| Err(swat::error::Error::failed("no", "nothing"))) };
    assert!(refused.is_err());
    cuda.synchronize().unwrap();
}

#[test]
fn rooflines_are_plausible() {
    let (Roofline { flops_per_s, bytes_per_s }, whose) = Cpu::new().ceilings(Scale::tiny());
    assert_eq!(whose, "swat");
    assert!((1e9..1e14).contains(&flops_per_s), "{flops_per_s}");
    assert!((1e8..1e13).contains(&bytes_per_s), "{bytes_per_s}");
    let _turn = exclusive();
    let Some(cuda) = standin::open(0) else { return };
    if standin::real() {
        return;
    }
    known_clock(0, 1_000_000);
    let scale = Scale::tiny();
    let (Roofline { flops_per_s, bytes_per_s }, _) = cuda.ceilings(scale);
    known_clock(0, 0);
    // One launch each, of a millisecond.
    assert!((flops_per_s / (2e3 * (scale.ceiling_side as f64).powi(3)) - 1.0).abs() < 1e-4, "{flops_per_s}");
    assert!((bytes_per_s / (2e3 * scale.ceiling_bytes as f64) - 1.0).abs() < 1e-4, "{bytes_per_s}");
}

/// Two runs of the same work agree within a quarter, in the best of ten attempts, as the machine may be busy.
#[test]
fn repeated_runs_agree() {
    let device = Cpu::new();
    let mut session = session("clock");
    let make = |d: &Cpu| [random(d, 1 << 16), random(d, 1 << 16)];
    let ladder = session.ladder(&device, "copy", "65536", Cost { bytes: 1 << 19, flops: 0 }, make);
    let mut ladder = ladder.variant("swat", copy);
    let ratios: Vec<f64> = (0..10).map(|_| median(&ladder.samples(0)) / median(&ladder.samples(0))).collect();
    assert!(ratios.iter().any(|ratio| (0.8..1.25).contains(ratio)), "{ratios:?}");
}

#[test]
fn buffers_are_rotated_beyond_the_cache() {
    let device = Cpu::new();
    let made = std::cell::Cell::new(0);
    let mut session = Session::new("clock", Mode::Json(Choice::default()), Scale::cpu());
    let bytes = device.cache_bytes() / 10;
    let make = |d: &Cpu| {
        made.set(made.get() + 1);
        pair(d)
    };
    let ladder = session.ladder(&device, "copy", "large", Cost { bytes, flops: 0 }, make);
    ladder.variant("swat", copy).samples(0);
    assert_eq!(made.get(), 11);
}
