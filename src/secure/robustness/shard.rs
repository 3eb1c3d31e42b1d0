//! One of several equal shares of a map, for the tasks of a job array.

use crate::error::{Error, Result};
use crate::options::serde_as_text;
use std::fmt;
use std::str::FromStr;

/// Most shards of a map; far above the groups of cells of any model.
const MAX_COUNT: usize = 1 << 20;

/// Share `index` of `count`, written `index/count`: the groups of cells whose number is `index` modulo `count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shard {
    index: usize,
    count: usize,
}

impl Shard {
    /// Share `index`, from 0, of `count`.
    ///
    /// # Errors
    /// [`Error::Input`] for an index outside the count.
    pub fn new(index: usize, count: usize) -> Result<Self> {
        if count == 0 || count > MAX_COUNT {
            return Err(Error::input("shards", count.to_string(), format!("a count of 1 to {MAX_COUNT}")));
        }
        if index >= count {
            let expected = format!("an index from 0 to {}: with {count} shards, an array 0-{}", count - 1, count - 1);
            return Err(Error::input("shard", format!("index {index} of {count}"), expected));
        }
        Ok(Self { index, count })
    }

    /// Number of the share, from 0.
    pub fn index(self) -> usize {
        self.index
    }

    /// Number of shares.
    pub fn count(self) -> usize {
        self.count
    }

    /// Whether the group of cells of this number, from 0, belongs to it.
    pub(crate) fn has(self, group: usize) -> bool {
        group % self.count == self.index
    }

    /// The share of this task of a job array, from the variables of its scheduler: Slurm, SGE, LSF; Kubernetes (indexed
    /// jobs) and PBS, which tell no count. With `count` the scheduler's number is taken as it is, from 0 (LSF: from 1).
    ///
    /// # Errors
    /// [`Error::Input`] where there is no array, more than one, or one that leaves the share open.
    pub fn from_scheduler(variable: impl Fn(&str) -> Option<String>, count: Option<usize>) -> Result<Self> {
        // SGE and LSF say so of a job that is no array.
        let none = |name: &str, text: &str| ["", "undefined"].contains(&text) || name == LSF && text == "0";
        let is_set = |of: &&Scheduler| variable(of.task).is_some_and(|text| !none(of.task, text.trim()));
        let found: Vec<&Scheduler> = SCHEDULERS.iter().filter(is_set).collect();
        let [Scheduler { task, first, last, step }] = found[..] else {
            let names = |of: &[&Scheduler], by: &str| of.iter().map(|of| of.task).collect::<Vec<_>>().join(by);
            let found = match found.is_empty() {
                true => format!("none of {}", names(&SCHEDULERS.each_ref(), ", ")),
                false => names(&found, " and "),
            };
            return Err(Error::input("--shard auto", found, "a task of one job array; or --shard INDEX/COUNT"));
        };
        let task = *task;
        let number = |name: &str| -> Result<Option<usize>> {
            let Some(text) = variable(name) else { return Ok(None) };
            let wrong = || Error::input(name, format!("`{}`", text.escape_debug()), "a whole number");
            text.trim().parse().map(Some).map_err(|_| wrong())
        };
        let index = number(task)?.unwrap_or(0);
        if let Some(count) = count {
            return Self::new(if task == LSF { index.saturating_sub(1) } else { index }, count);
        }
        let Some(last) = number(last)? else {
            return Err(Error::input("--shard auto", format!("{task} alone"), "the number of tasks: --shard-count"));
        };
        let first = if task == LSF { 1 } else { number(first)?.unwrap_or(0) };
        let step = number(step)?.unwrap_or(1).max(1);
        let regular = (first..=last).contains(&index) && (index - first) % step == 0 && (last - first) % step == 0;
        let tasks = last.saturating_sub(first) / step + 1;
        let told = if task == SLURM { number("SLURM_ARRAY_TASK_COUNT")? } else { None };
        if !regular || told.is_some_and(|told| told != tasks) {
            let found = format!("{task}={index} of an array {first}-{last} with gaps");
            return Err(Error::input("--shard auto", found, "--shard-count, the number of tasks of the whole array"));
        }
        Self::new((index - first) / step, tasks)
    }
}

const SLURM: &str = "SLURM_ARRAY_TASK_ID";
const LSF: &str = "LSB_JOBINDEX";

/// Variables of a scheduler: the task's own number, and the array's first, last and step; empty where it tells none.
struct Scheduler {
    task: &'static str,
    first: &'static str,
    last: &'static str,
    step: &'static str,
}

const SCHEDULERS: [Scheduler; 6] = [
    Scheduler {
        task: SLURM,
        first: "SLURM_ARRAY_TASK_MIN",
        last: "SLURM_ARRAY_TASK_MAX",
        step: "SLURM_ARRAY_TASK_STEP",
    },
    Scheduler { task: "SGE_TASK_ID", first: "SGE_TASK_FIRST", last: "SGE_TASK_LAST", step: "SGE_TASK_STEPSIZE" },
    Scheduler { task: LSF, first: "", last: "LSB_JOBINDEX_END", step: "LSB_JOBINDEX_STEP" },
    Scheduler { task: "JOB_COMPLETION_INDEX", first: "", last: "", step: "" },
    Scheduler { task: "PBS_ARRAY_INDEX", first: "", last: "", step: "" },
    Scheduler { task: "PBS_ARRAYID", first: "", last: "", step: "" },
];

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

impl FromStr for Shard {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let numbers = text.split_once('/').and_then(|(index, count)| Some((index.parse().ok()?, count.parse().ok()?)));
        let Some((index, count)) = numbers else {
            let found = format!("`{}`", text.chars().take(80).collect::<String>().escape_debug());
            return Err(Error::input("shard", found, "INDEX/COUNT, the index from 0, such as 0/8"));
        };
        Self::new(index, count)
    }
}

serde_as_text!(Shard);

#[cfg(test)]
mod tests {
    use super::*;

    fn auto(variables: &[(&str, &str)], count: Option<usize>) -> Result<String, String> {
        let variable = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        Shard::from_scheduler(variable, count).map(|shard| shard.to_string()).map_err(|e| e.to_string())
    }

    /// A Slurm array with its task, first, last, step and number of tasks, as sbatch sets them.
    fn slurm([id, min, max, step, count]: [&str; 5]) -> Vec<(&str, &str)> {
        let names = ["ID", "MIN", "MAX", "STEP", "COUNT"].map(|name| match name {
            "ID" => SLURM,
            "MIN" => "SLURM_ARRAY_TASK_MIN",
            "MAX" => "SLURM_ARRAY_TASK_MAX",
            "STEP" => "SLURM_ARRAY_TASK_STEP",
            _ => "SLURM_ARRAY_TASK_COUNT",
        });
        names.into_iter().zip([id, min, max, step, count]).collect()
    }

    #[test]
    fn arrays_of_schedulers() {
        for (task, expected) in [
            (["3", "0", "7", "1", "8"], "3/8"),
            (["8", "1", "8", "1", "8"], "7/8"),
            (["10", "2", "14", "4", "4"], "2/4"),
        ] {
            assert_eq!(auto(&slurm(task), None).unwrap(), expected);
        }
        // Two tasks of an array that are run again, by the number of tasks of the whole.
        let again = slurm(["5", "3", "5", "1", "2"]);
        assert!(auto(&again, None).unwrap_err().contains("--shard-count"));
        assert_eq!(auto(&again, Some(8)).unwrap(), "5/8");
        assert!(auto(&slurm(["8", "1", "8", "1", "8"]), Some(8)).unwrap_err().contains("an array 0-7"));

        let sge = [("SGE_TASK_ID", "4"), ("SGE_TASK_FIRST", "1"), ("SGE_TASK_LAST", "5"), ("SGE_TASK_STEPSIZE", "1")];
        assert_eq!(auto(&sge, None).unwrap(), "3/5");
        let lsf = [(LSF, "2"), ("LSB_JOBINDEX_END", "6")];
        assert_eq!((auto(&lsf, None).unwrap(), auto(&lsf, Some(9)).unwrap()), ("1/6".into(), "1/9".into()));
        for index_alone in ["JOB_COMPLETION_INDEX", "PBS_ARRAY_INDEX", "PBS_ARRAYID"] {
            let error = auto(&[(index_alone, "2")], None).unwrap_err();
            assert!(error.contains(index_alone) && error.contains("--shard-count"), "{error}");
            assert_eq!(auto(&[(index_alone, "2")], Some(3)).unwrap(), "2/3");
            assert!(auto(&[(index_alone, "3")], Some(3)).unwrap_err().contains("index 3 of 3"));
            assert!(auto(&[(index_alone, "two")], Some(3)).unwrap_err().contains("`two`"));
        }
    }

    #[test]
    fn what_is_no_array_is_refused() {
        for variables in [&[][..], &[("SGE_TASK_ID", "undefined")], &[(LSF, "0")], &[(SLURM, "")]] {
            let error = auto(variables, None).unwrap_err();
            assert!(error.contains("none of SLURM_ARRAY_TASK_ID"), "{error}");
        }
        let error = auto(&[("JOB_COMPLETION_INDEX", "0"), (SLURM, "1")], Some(4)).unwrap_err();
        assert!(error.contains("SLURM_ARRAY_TASK_ID and JOB_COMPLETION_INDEX"), "{error}");
    }

    #[test]
    fn groups_belong_to_one_shard() {
        let shards: Vec<Shard> = (0..3).map(|index| Shard::new(index, 3).unwrap()).collect();
        for group in 0..10 {
            assert_eq!(shards.iter().filter(|shard| shard.has(group)).count(), 1);
        }
        assert_eq!("2/5".parse::<Shard>().unwrap(), Shard::new(2, 5).unwrap());
        for text in ["", "1", "5/5", "1/0", "-1/4", "a/b", "0/99999999999999999999", "1/2/3"] {
            assert!(text.parse::<Shard>().is_err(), "{text}");
        }
    }
}
