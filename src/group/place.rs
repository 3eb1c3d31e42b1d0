//! The place of a process among those that a launcher has started: torchrun, Slurm, Open MPI, or a PMI.

use super::Share;
use crate::error::{Error, Result};

/// Port of the first rank where neither a launcher nor a scheduler says one.
const PORT: u16 = 29_401;

/// A process's rank, and where the ranks meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Rank and number of ranks.
    pub share: Share,
    /// Rank among the processes of this machine: the number of its GPU.
    pub local_rank: usize,
    /// Number of processes that share the cores of this machine; 1 where the launcher divides them itself, or may.
    pub local_size: usize,
    /// Host name or address of the machine of rank 0.
    pub host: String,
    /// Port on which rank 0 waits for the others.
    pub port: u16,
    /// Name of the job, by which two jobs on one port are told apart; empty where the launcher gives none.
    pub job: String,
}

/// Variables of a launcher.
struct Launcher {
    rank: &'static str,
    size: &'static str,
    local_rank: &'static str,
    job: &'static str,
}

/// In the order in which they are asked: a launcher may itself run below another.
const LAUNCHERS: [Launcher; 4] = [
    Launcher { rank: "RANK", size: "WORLD_SIZE", local_rank: "LOCAL_RANK", job: "TORCHELASTIC_RUN_ID" },
    // The number of tasks of the step, and not of the job, so that a batch script itself is no rank.
    Launcher { rank: "SLURM_PROCID", size: "SLURM_STEP_NUM_TASKS", local_rank: "SLURM_LOCALID", job: "SLURM_JOB_ID" },
    Launcher {
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        job: "PMIX_NAMESPACE",
    },
    Launcher { rank: "PMI_RANK", size: "PMI_SIZE", local_rank: "MPI_LOCALRANKID", job: "" },
];

impl Place {
    /// The place by the variables of the launcher; `None` for a process that is alone.
    ///
    /// # Errors
    /// [`Error::Input`] names the variable that is wrong or missing.
    pub fn from_launcher(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let set = |name: &str| variable(name).map(|text| text.trim().to_owned()).filter(|text| !text.is_empty());
        let number = |name: &str| -> Result<Option<usize>> {
            let Some(text) = set(name) else { return Ok(None) };
            let wrong = || Error::input(name, format!("`{}`", text.escape_debug()), "a whole number");
            text.parse().map(Some).map_err(|_| wrong())
        };
        let Some(launcher) = LAUNCHERS.iter().find(|known| set(known.rank).is_some() && set(known.size).is_some())
        else {
            return Ok(None);
        };
        let (rank, size) = (number(launcher.rank)?.unwrap_or(0), number(launcher.size)?.unwrap_or(1));
        if rank >= size {
            let expected = format!("a rank below {}, which is {size}", launcher.size);
            return Err(Error::input(launcher.rank, rank.to_string(), expected));
        }
        if size == 1 {
            return Ok(None);
        }
        let host = match set("MASTER_ADDR").or_else(|| first_host(&set("SLURM_STEP_NODELIST")?)) {
            Some(host) => host,
            None if number("OMPI_COMM_WORLD_LOCAL_SIZE")? == Some(size) => "127.0.0.1".to_owned(),
            None => return Err(Error::input("MASTER_ADDR", "nothing", "the host name or address of rank 0's machine")),
        };
        let given = number("MASTER_PORT")?;
        let port = match (given, number("SLURM_JOB_ID")?) {
            // The launcher itself, or PyTorch beside it, has that one.
            (Some(port), _) => port.saturating_add(1),
            (None, Some(job)) => usize::from(PORT) + job % 10_000,
            (None, None) => usize::from(PORT),
        };
        let too_large = |_| Error::input("MASTER_PORT", given.unwrap_or(port).to_string(), "a port from 0 to 65534");
        let port = u16::try_from(port).map_err(too_large)?;
        let local_rank = number(launcher.local_rank)?.unwrap_or(0);
        let local_size = number("LOCAL_WORLD_SIZE")?.filter(|_| launcher.rank == "RANK").unwrap_or(1).max(1);
        let job = set(launcher.job).unwrap_or_default();
        Ok(Some(Self { share: Share { rank, size }, local_rank, local_size, host, port, job }))
    }

    /// The variables by which [`Place::from_launcher`] finds this place.
    pub(super) fn variables(&self) -> [(&'static str, String); 7] {
        [
            ("RANK", self.share.rank.to_string()),
            ("WORLD_SIZE", self.share.size.to_string()),
            ("LOCAL_RANK", self.local_rank.to_string()),
            ("LOCAL_WORLD_SIZE", self.local_size.to_string()),
            ("MASTER_ADDR", self.host.clone()),
            ("MASTER_PORT", self.port.saturating_sub(1).to_string()),
            ("TORCHELASTIC_RUN_ID", self.job.clone()),
        ]
    }
}

/// The first host of a list of Slurm's, such as `gpu[017-020,031],login1`: `gpu017`.
fn first_host(list: &str) -> Option<String> {
    let end = list.find([',', '[']).unwrap_or(list.len());
    let (name, rest) = list.split_at(end);
    let Some(numbers) = rest.strip_prefix('[') else { return Some(name.to_owned()).filter(|name| !name.is_empty()) };
    let (numbers, after) = numbers.split_once(']')?;
    let first = numbers.split([',', '-']).next()?;
    Some(format!("{name}{first}{}", first_host(after).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(variables: &[(&str, &str)]) -> Result<Option<Place>, String> {
        let variable = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
        Place::from_launcher(variable).map_err(|e| e.to_string())
    }

    fn at(rank: usize, size: usize, local_rank: usize, host: &str, port: u16, job: &str) -> Place {
        Place { share: Share { rank, size }, local_rank, local_size: 1, host: host.into(), port, job: job.into() }
    }

    #[test]
    fn a_place_is_found_by_its_own_variables() {
        let own = Place { local_size: 4, ..at(2, 4, 2, "127.0.0.1", 40_000, "7-1") };
        let variables = own.variables();
        assert_eq!(
            Place::from_launcher(|name| {
                variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone())
            })
            .unwrap(),
            Some(own)
        );
    }

    #[test]
    fn launchers() {
        let torchrun = [
            ("RANK", "5"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "10.0.0.7"),
            ("MASTER_PORT", "29500"),
            ("TORCHELASTIC_RUN_ID", "none"),
        ];
        assert_eq!(place(&torchrun).unwrap(), Some(at(5, 8, 1, "10.0.0.7", 29_501, "none")));
        let srun = [
            ("SLURM_PROCID", "9"),
            ("SLURM_STEP_NUM_TASKS", "16"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_JOB_ID", "1234567"),
            ("SLURM_STEP_NODELIST", "gpu[017-018]"),
        ];
        assert_eq!(place(&srun).unwrap(), Some(at(9, 16, 1, "gpu017", 29_401 + 4567, "1234567")));
        // torchrun below srun.
        assert_eq!(place(&[&torchrun[..], &srun].concat()).unwrap().unwrap().share.rank, 5);
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "2"),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "2"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
        ];
        assert_eq!(place(&mpi).unwrap(), Some(at(2, 4, 2, "127.0.0.1", PORT, "")));
        let pmi = [("PMI_RANK", "3"), ("PMI_SIZE", "4"), ("MPI_LOCALRANKID", "0"), ("MASTER_ADDR", "head")];
        assert_eq!(place(&pmi).unwrap(), Some(at(3, 4, 0, "head", PORT, "")));
    }

    #[test]
    fn a_process_alone_and_wrong_values() {
        let batch_script = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "16"), ("SLURM_JOB_ID", "7")];
        for alone in [&[][..], &batch_script, &[("RANK", "0"), ("WORLD_SIZE", "1")], &[("RANK", "3")]] {
            assert_eq!(place(alone).unwrap(), None, "{alone:?}");
        }
        for (variables, named) in [
            (&[("RANK", "x"), ("WORLD_SIZE", "4")][..], "RANK: found `x`"),
            (&[("RANK", "4"), ("WORLD_SIZE", "4")], "below WORLD_SIZE, which is 4"),
            (&[("PMI_RANK", "0"), ("PMI_SIZE", "4")], "MASTER_ADDR: found nothing"),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "65535")],
                "MASTER_PORT: found 65535",
            ),
            (
                &[("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "18446744073709551615")],
                "MASTER_PORT: found 18446744073709551615",
            ),
        ] {
            let error = place(variables).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn hosts_of_slurm() {
        for (list, first) in [
            ("node1", "node1"),
            ("node1,node2", "node1"),
            ("gpu[017-020,031],login1", "gpu017"),
            ("n[3]-ib,x", "n3-ib"),
            ("r[1-2]c[3-4],s", "r1c3"),
        ] {
            assert_eq!(first_host(list).as_deref(), Some(first));
        }
        assert_eq!(first_host(""), None);
    }
}
