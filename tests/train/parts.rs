//! Moments of several ranks in a checkpoint: a file of each rank where all see the directory, else one that rank 0 gathers.

use crate::parallel_saved::{Case, Done, cases};
use crate::run::{examples, lines, model, options, run_dir, two_phases};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use swat::backend::ViewMut;
use swat::backend::cpu::Cpu;
use swat::error::Result;
use swat::group::{Group, Hosted, ReduceScatter, Share, Threads, Traffic};
use swat::io::safetensors::Safetensors;
use swat::train::{Callbacks, RunPosition, StepMetrics, Tuner};

/// Directories of ranks: the same for all, or one for each, of which the first is given.
struct Dirs {
    first: tempfile::TempDir,
    others: tempfile::TempDir,
}

impl Dirs {
    fn new() -> Self {
        Self { first: tempfile::tempdir().unwrap(), others: tempfile::tempdir().unwrap() }
    }

    fn of(&self, size: usize, shared: bool) -> Vec<PathBuf> {
        let of_rank = |rank: usize| match (rank, shared) {
            (0, _) | (_, true) => self.first.path().to_owned(),
            _ => self.others.path().join(rank.to_string()),
        };
        (0..size).map(of_rank).collect()
    }

    fn run(&self, case: &Case, (size, shared): (usize, bool)) -> Vec<Done> {
        case.ranks_in(&self.of(size, shared).iter().map(PathBuf::as_path).collect::<Vec<_>>())
    }

    fn step(&self, step: u64) -> PathBuf {
        self.first.path().join(format!("checkpoints/step-{step:08}"))
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn part(rank: usize, size: usize) -> String {
    format!("moments-{rank}-of-{size}.safetensors")
}

/// What the ranks write is, part behind part, what rank 0 would have gathered.
#[test]
fn each_rank_writes_its_part() {
    for case in cases() {
        let case = Case { stop_at: Some(13), ..case };
        let (shared, apart) = (Dirs::new(), Dirs::new());
        let (by_each, by_first) = (shared.run(&case, (3, true)), apart.run(&case, (3, false)));
        assert_eq!(by_each[0].infos, ["checkpoints: each rank writes its own moments"]);
        let [line] = &by_first[0].infos[..] else { panic!("{:?}", by_first[0].infos) };
        assert!(line.starts_with("checkpoints: rank 0 writes the moments of all ranks"), "{line}");
        assert!(line.contains("(rank 1: ") && line.contains("cannot read"), "{line}");
        assert!(by_each[1].infos.is_empty() && by_first[1].infos.is_empty(), "rank 0 says it");
        assert_eq!(names(apart.others.path()), Vec::<String>::new(), "who does not share writes nothing");

        let (parts, whole) = (shared.step(12), apart.step(12));
        let mut expected: Vec<String> = names(&whole);
        expected.retain(|name| name != "moments.safetensors");
        expected.extend((0..3).map(|rank| part(rank, 3)));
        expected.sort();
        assert_eq!(names(&parts), expected);
        for name in names(&whole).iter().filter(|name| names(&parts).contains(name)) {
            let same = fs::read(parts.join(name)).unwrap() == fs::read(whole.join(name)).unwrap();
            // Its position in the metrics, whose times differ, and the number of files.
            assert!(same || ["state.json", "manifest.json"].contains(&name.as_str()), "{name}");
        }
        let open = |path: PathBuf| Safetensors::open(&path).unwrap();
        let (whole, parts) = (open(whole.join("moments.safetensors")), [0, 1, 2].map(|r| open(parts.join(part(r, 3)))));
        for (rank, file) in parts.iter().enumerate() {
            assert!(file.tensors().map(|(name, ..)| name).eq(whole.tensors().map(|(name, ..)| name)));
            for (name, _, shape) in file.tensors() {
                let len = whole.info(name).unwrap().1.iter().product();
                assert_eq!(shape, [Share { rank, size: 3 }.of(len).len()], "{name}");
            }
        }
        for (name, ..) in whole.tensors() {
            let joined: Vec<u8> = parts.iter().flat_map(|part| part.bytes(name).unwrap().to_vec()).collect();
            assert!(joined == whole.bytes(name).unwrap(), "{name}");
        }
    }
}

/// Whoever wrote a checkpoint, and whoever sees it: the same bytes by as many ranks, the same losses by others.
#[test]
fn any_number_of_ranks_continues_any_other() {
    const MOVES: [((usize, bool), (usize, bool)); 8] = [
        ((4, true), (4, true)),
        ((4, true), (2, true)),
        ((2, true), (3, true)),
        ((3, true), (1, true)),
        ((1, true), (4, true)),
        ((4, true), (3, false)),
        ((3, false), (4, true)),
        ((3, true), (3, false)),
    ];
    for (i, case) in cases().into_iter().enumerate() {
        for (from, to) in MOVES {
            let name = format!("case {i}, {from:?} to {to:?}");
            let whole = Dirs::new();
            let straight = whole.run(&case, from);
            let dirs = Dirs::new();
            let stopped = dirs.run(&Case { stop_at: Some(14), ..case.clone() }, from);
            assert!(stopped.iter().all(|done| done.summary.is_err()), "{name}");
            let resumed = dirs.run(&case, to);
            for done in &resumed {
                assert_eq!(done.summary.as_ref().unwrap().resumed_from, Some(12), "{name}");
                assert!(done.bits == resumed[0].bits, "{name}: other weights");
                assert_eq!(done.steps.len(), 3, "{name}");
                for (found, expected) in done.steps.iter().zip(&straight[0].steps[12..]) {
                    let apart = (found.loss.unwrap() / expected.loss.unwrap() - 1.0).abs();
                    assert!(apart <= 1e-6, "{name}, step {}: {apart:e}", found.step);
                }
            }
            if from.0 == to.0 {
                assert!(resumed[0].bits == straight[0].bits, "{name}: other weights than without an interruption");
                assert_eq!(lines(dirs.first.path()), lines(whole.first.path()), "{name}");
            }
            // What another number of ranks has left is no part of the new checkpoint.
            let (size, shared) = to;
            let moments: Vec<String> =
                names(&dirs.step(15)).into_iter().filter(|name| name.starts_with("moments")).collect();
            let expected: Vec<String> = match shared && size > 1 {
                true => (0..size).map(|rank| part(rank, size)).collect(),
                false => vec!["moments.safetensors".into()],
            };
            assert_eq!(moments, expected, "{name}");
        }
    }
}

/// A checkpoint with a part that is missing, cut, another rank's or another run's is refused, and the part is named.
#[test]
fn a_damaged_part_is_named() {
    let [case, ..] = cases();
    let stopped = Case { stop_at: Some(14), ..case.clone() };
    let mut other = stopped.clone();
    other.options.seed = 77;
    let foreign = Dirs::new();
    foreign.run(&other, (3, true));
    let foreign = fs::read(foreign.step(12).join(part(1, 3))).unwrap();

    type Damage<'a> = &'a dyn Fn(&Path);
    let missing = |dir: &Path| fs::remove_file(dir.join(part(1, 3))).unwrap();
    let cut = |dir: &Path| {
        let bytes = fs::read(dir.join(part(1, 3))).unwrap();
        fs::write(dir.join(part(1, 3)), &bytes[..bytes.len() - 1]).unwrap();
    };
    let swapped = |dir: &Path| {
        fs::rename(dir.join(part(0, 3)), dir.join("a")).unwrap();
        fs::rename(dir.join(part(1, 3)), dir.join(part(0, 3))).unwrap();
        fs::rename(dir.join("a"), dir.join(part(1, 3))).unwrap();
    };
    let anothers = |dir: &Path| {
        assert_eq!(fs::read(dir.join(part(1, 3))).unwrap().len(), foreign.len(), "of the same size");
        fs::write(dir.join(part(1, 3)), &foreign).unwrap();
    };
    for (damage, named, why) in [
        (&missing as Damage, part(1, 3), "cannot open: No such file"),
        (&cut, part(1, 3), "bytes; expected"),
        (&swapped, part(0, 3), "blake3"),
        (&anothers, part(1, 3), "blake3"),
    ] {
        for to in [(3, true), (1, true), (2, false)] {
            let dirs = Dirs::new();
            dirs.run(&stopped, (3, true));
            damage(&dirs.step(12));
            // The one before is whole.
            let resumed = dirs.run(&case, to);
            let [note] = &resumed[0].notes[..] else { panic!("{:?}", resumed[0].notes) };
            assert!(note.contains("checkpoint of step 12 is damaged and ignored") && note.contains(&named), "{note}");
            assert!(note.contains(why), "{note}");
            let from = resumed.iter().map(|done| done.summary.as_ref().unwrap().resumed_from);
            assert!(from.into_iter().all(|from| from == Some(9)), "{to:?}");

            let dirs = Dirs::new();
            dirs.run(&stopped, (3, true));
            for step in names(&dirs.first.path().join("checkpoints")) {
                if step != "step-00000012" {
                    fs::remove_dir_all(dirs.first.path().join("checkpoints").join(step)).unwrap();
                }
            }
            damage(&dirs.step(12));
            for done in dirs.run(&case, to) {
                let error = done.summary.unwrap_err().to_string();
                assert!(error.contains("all 1 checkpoints are damaged") && error.contains(&named), "{error}");
                assert!(error.contains(why) && error.contains("start again without --resume"), "{error}");
            }
            assert!(dirs.step(12).exists(), "what is damaged may be mended");
        }
    }
}

/// Counts the bytes that a rank sends beside the tensors of steps.
struct Counting {
    group: Hosted<Threads>,
    to_first: AtomicU64,
}

impl Counting {
    fn cpu(&self) -> &dyn Group<Cpu> {
        &self.group
    }
}

impl Group<Cpu> for Counting {
    fn share(&self) -> Share {
        self.cpu().share()
    }
    fn all_reduce(&self, values: &mut [f64]) -> Result<()> {
        self.cpu().all_reduce(values)
    }
    fn reduce_scatter(&self, backend: &Cpu) -> Result<Box<dyn ReduceScatter<Cpu> + '_>> {
        self.cpu().reduce_scatter(backend)
    }
    fn all_gather(&self, backend: &Cpu, tensors: &mut [ViewMut<'_, Cpu, f32>]) -> Result<()> {
        self.cpu().all_gather(backend, tensors)
    }
    fn exchange(&self, messages: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        if self.cpu().share().rank > 0 {
            self.to_first.fetch_add(messages[0].len() as u64, Relaxed);
        }
        self.cpu().exchange(messages)
    }
    fn traffic(&self) -> Traffic {
        self.cpu().traffic()
    }
}

#[test]
fn no_moments_go_to_the_first_rank() {
    let [case, ..] = cases();
    let bytes_to_first = |dirs: Vec<PathBuf>| -> u64 {
        let counting = |group| Counting { group, to_first: AtomicU64::new(0) };
        let groups: Vec<Counting> = Threads::groups(3).into_iter().map(counting).collect();
        std::thread::scope(|scope| {
            for (group, dir) in groups.iter().zip(&dirs) {
                let case = &case;
                scope.spawn(move || case.rank(group, run_dir(dir, false)).summary.unwrap());
            }
        });
        groups.iter().map(|group| group.to_first.load(Relaxed)).sum()
    };
    let (shared, apart) = (Dirs::new(), Dirs::new());
    let (by_each, by_first) = (bytes_to_first(shared.of(3, true)), bytes_to_first(apart.of(3, false)));
    // Of the second phase: after its second and its fifth step.
    let parts: u64 = [1, 2].map(|rank| fs::metadata(shared.step(12).join(part(rank, 3))).unwrap().len()).iter().sum();
    assert!(parts > 50_000, "{parts}");
    assert!(by_first > 2 * parts - 20_000, "{by_first} bytes of moments, {parts} in a checkpoint");
    assert!(by_each < parts / 4, "{by_each} bytes, and {parts} are the moments of one checkpoint");
}

/// Takes away the way to a rank's directory in the middle of a run.
struct Cut<'a> {
    link: &'a Path,
    at: u64,
}

impl Callbacks<Cpu> for Cut<'_> {
    fn step(&mut self, _: &StepMetrics, at: &RunPosition) -> Result<()> {
        if at.step == self.at {
            fs::remove_file(self.link).unwrap();
        }
        Ok(())
    }
}

/// All ranks end with the reason, the checkpoint before stays, and nothing of the new one.
#[test]
#[cfg(unix)]
fn a_rank_that_cannot_write_ends_all() {
    let [case, ..] = cases();
    let (dir, links) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let link = links.path().join("link");
    std::os::unix::fs::symlink(dir.path(), &link).unwrap();
    let rank = |(rank, group): (usize, Hosted<Threads>)| {
        let (own, mut cut) = match rank {
            1 => (link.as_path(), Some(Cut { link: &link, at: 11 })),
            _ => (dir.path(), None),
        };
        let mut decoder = model();
        let options = case.options.clone();
        let mut loader = options.load(examples(11)).unwrap();
        let mut phases = two_phases(7, 8);
        phases.iter_mut().for_each(|phase| phase.options.lr = 2e-4);
        let tuner = Tuner::new(&mut decoder, &mut loader, options, phases).unwrap();
        let tuner = tuner.measure_updates().at(run_dir(own, true)).group(&group);
        match &mut cut {
            Some(cut) => tuner.run(cut),
            None => tuner.run(&mut ()),
        }
    };
    let results: Vec<String> = std::thread::scope(|scope| {
        let rank = &rank;
        let start = |group| scope.spawn(move || rank(group).unwrap_err().to_string());
        let ranks: Vec<_> = Threads::groups(3).into_iter().enumerate().map(start).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    for (rank, error) in results.iter().enumerate() {
        assert!(error.contains(".unfinished-00000012/moments-1-of-3.safetensors: cannot create"), "{error}");
        assert_eq!(error.starts_with("rank 1 could not write its part of a checkpoint: "), rank != 1, "{error}");
        assert_eq!(error.contains("continue with --resume"), rank != 1, "{error}");
    }
    assert_eq!(names(&dir.path().join("checkpoints")), ["step-00000007", "step-00000009"]);

    let straight = tempfile::tempdir().unwrap();
    let (straight, resumed) = (case.ranks(3, straight.path()), case.ranks(3, dir.path()));
    assert_eq!(resumed[0].summary.as_ref().unwrap().resumed_from, Some(9));
    assert!(resumed[0].bits == straight[0].bits, "other weights than without an interruption");
}

/// What a run that was killed has left goes away when it is continued, and nothing else does.
#[test]
fn what_was_never_finished_goes_away() {
    let [case, ..] = cases();
    let dir = tempfile::tempdir().unwrap();
    Case { stop_at: Some(5), ..case.clone() }.ranks(4, dir.path());
    let checkpoints = dir.path().join("checkpoints");
    let left = checkpoints.join(".unfinished-00000006");
    fs::create_dir(&left).unwrap();
    fs::write(left.join(part(3, 4)), "half").unwrap();
    fs::write(checkpoints.join("notes.txt"), "mine").unwrap();
    let stopped = Case { stop_at: Some(4), ..case.clone() }.ranks(2, dir.path());
    assert!(stopped.iter().all(|done| done.summary.is_err()), "before it has saved anything");
    assert_eq!(names(&checkpoints), ["notes.txt", "step-00000003"]);
    let options = options();
    assert_eq!((options.save_every, options.keep_last), (3, 2), "what the steps above follow from");
}
