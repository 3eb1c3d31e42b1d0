//! Checkpoints of several ranks: bit for bit at the same number of ranks, up to rounding at another one.

use crate::run::{Recorder, bits, examples, lines, model, options, run_dir, two_phases};
use std::collections::BTreeMap;
use std::path::Path;
use swat::backend::cpu::Cpu;
use swat::data::Loader;
use swat::engine::{Decoder, Lora};
use swat::error::Result;
use swat::group::{Alone, Group, Threads};
use swat::io::safetensors::{Dtype, Safetensors};
use swat::modules::ParamId;
use swat::train::{RunDir, StepMetrics, TuneOptions, TuneSummary, Tuner};

/// What a rank ends with.
pub struct Done {
    pub summary: Result<TuneSummary>,
    pub steps: Vec<StepMetrics>,
    pub bits: BTreeMap<ParamId, Vec<u32>>,
    pub notes: Vec<String>,
    pub infos: Vec<String>,
}

/// Seven steps on some modules, eight on everything, with a checkpoint after every third and at the end of each phase.
#[derive(Clone)]
pub struct Case {
    pub lora: bool,
    pub options: TuneOptions,
    pub stop_at: Option<u64>,
}

impl Case {
    fn decoder(&self) -> Decoder<Cpu> {
        let mut decoder = model();
        if self.lora {
            let cells = decoder.config.cells();
            decoder.add_lora(&cells, Lora { rank: 2, ..Lora::default() }, 3).unwrap();
        }
        decoder
    }

    pub fn rank(&self, group: &dyn Group<Cpu>, run_dir: RunDir) -> Done {
        let mut phases = two_phases(7, 8);
        phases.iter_mut().for_each(|phase| phase.options.lr = 2e-4);
        let mut decoder = self.decoder();
        let mut loader = Loader::new(examples(11), self.options.loader()).unwrap();
        let mut recorded = Recorder { stop_at: self.stop_at, ..Recorder::default() };
        let tuner = Tuner::new(&mut decoder, &mut loader, self.options.clone(), phases).unwrap();
        let summary = tuner.measure_updates().at(run_dir).group(group).run(&mut recorded);
        let Recorder { steps, notes, infos, .. } = recorded;
        Done { summary, steps, bits: bits(&decoder), notes, infos }
    }

    pub fn ranks(&self, size: usize, dir: &Path) -> Vec<Done> {
        self.ranks_in(&vec![dir; size])
    }

    /// As many ranks as directories, each with its own.
    pub fn ranks_in(&self, dirs: &[&Path]) -> Vec<Done> {
        if let [dir] = dirs {
            return vec![self.rank(&Alone, run_dir(dir, true))];
        }
        std::thread::scope(|scope| {
            // Each has its group to itself, so that its end ends the others.
            let groups = Threads::groups(dirs.len()).into_iter().zip(dirs);
            let ranks = groups.map(|(group, dir)| scope.spawn(move || self.rank(&group, run_dir(dir, true))));
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }
}

/// Plain, with adapters, and with all that is saved beside weights and moments.
pub fn cases() -> [Case; 3] {
    let plain = TuneOptions { batch_size: 5, ..options() };
    let beside = TuneOptions { ema_decay: Some(0.9), prox: Some(0.5), keep_optimizer: true, ..plain.clone() };
    [(false, plain.clone()), (true, plain), (false, beside)].map(|(lora, options)| Case {
        lora,
        options,
        stop_at: None,
    })
}

#[test]
fn a_run_continues_at_any_number_of_ranks() {
    for (i, case) in cases().into_iter().enumerate() {
        let straight_dir = tempfile::tempdir().unwrap();
        let straight = case.ranks(3, straight_dir.path());
        let expected = straight[0].summary.as_ref().unwrap();
        assert!(straight.iter().all(|done| done.bits == straight[0].bits && done.steps.len() == 15));
        // Checkpoints are those of the third step of each three, and of the end of the first phase.
        for (stop, saved) in [(5, 3), (9, 7), (14, 12)] {
            for size in [3, 1, 2, 4] {
                let name = format!("case {i}, stopped at {stop}, continued by {size}");
                let dir = tempfile::tempdir().unwrap();
                let stopped = Case { stop_at: Some(stop), ..case.clone() }.ranks(3, dir.path());
                assert!(stopped.iter().all(|done| done.summary.is_err()), "{name}");
                let resumed = case.ranks(size, dir.path());
                for done in &resumed {
                    let summary = done.summary.as_ref().unwrap();
                    assert_eq!(summary.resumed_from, Some(saved), "{name}");
                    assert!(done.bits == resumed[0].bits, "{name}: other weights");
                    for (found, expected) in done.steps.iter().zip(&straight[0].steps[saved as usize..]) {
                        let apart = (found.loss.unwrap() / expected.loss.unwrap() - 1.0).abs();
                        assert!(apart <= 1e-6, "{name}, step {}: {apart:e}", found.step);
                    }
                }
                if size == 3 {
                    assert!(resumed[0].bits == straight[0].bits, "{name}: other weights than without an interruption");
                    assert_eq!(lines(dir.path()), lines(straight_dir.path()), "{name}");
                    assert_eq!(resumed[0].summary.as_ref().unwrap().updates, expected.updates, "{name}");
                }
            }
        }
    }
}

#[test]
fn a_checkpoint_of_several_ranks_is_one_of_a_single_one() {
    for case in cases() {
        let (one, three) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (size, dir) in [(1, &one), (3, &three)] {
            assert!(Case { stop_at: Some(13), ..case.clone() }.ranks(size, dir.path())[0].summary.is_err());
        }
        let open = |dir: &Path, name: &str| {
            Safetensors::open(&dir.join("checkpoints/step-00000012").join(format!("{name}.safetensors"))).unwrap()
        };
        for (name, parts) in
            [("weights", vec!["weights"]), ("moments", vec!["moments-0-of-3", "moments-1-of-3", "moments-2-of-3"])]
        {
            let expected = open(one.path(), name);
            let parts: Vec<Safetensors> = parts.into_iter().map(|part| open(three.path(), part)).collect();
            let names = |file: &Safetensors| -> Vec<String> { file.tensors().map(|(name, ..)| name.into()).collect() };
            assert!(names(&expected).len() > 10 && parts.iter().all(|part| names(part) == names(&expected)));
            for tensor in names(&expected) {
                let values = |file: &Safetensors| -> Vec<f32> {
                    let bytes = file.bytes(&tensor).unwrap();
                    assert_eq!(file.info(&tensor).unwrap().0, Dtype::F32);
                    bytes.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect()
                };
                let (found, expected): (Vec<f32>, _) = (parts.iter().flat_map(values).collect(), values(&expected));
                assert_eq!(found.len(), expected.len(), "{tensor}");
                let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
                let size = norm(&mut expected.iter().map(|x| f64::from(*x)));
                let apart = norm(&mut found.iter().zip(&expected).map(|(a, b)| f64::from(a - b)));
                assert!(size > 0.0 && apart <= 1e-3 * size, "{tensor}: {apart:e} of {size:e}");
            }
        }
    }
}

#[test]
fn ranks_with_other_data_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let [case, ..] = cases();
    let groups = Threads::groups(3);
    let errors: Vec<String> = std::thread::scope(|scope| {
        let mut ranks = Vec::new();
        for (rank, group) in groups.iter().enumerate() {
            let mut own = run_dir(dir.path(), false);
            if rank == 2 {
                own.data = "another".into();
            }
            let case = &case;
            ranks.push(scope.spawn(move || case.rank(group, own).summary.unwrap_err().to_string()));
        }
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    for error in &errors {
        assert!(error.starts_with("rank 2: ") && error.contains("data is \"d\" in rank 0"), "{error}");
    }
    assert!(!dir.path().join("checkpoints").exists() && !dir.path().join("metrics.jsonl").exists());
}
