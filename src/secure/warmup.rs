//! Warm-ups against the lengths of their phases, before weights are read.

use super::recipe::{Mix, mixed};
use super::tune::TuneJob;
use crate::data::Example;
use crate::error::Result;

/// Checks that the warm-up of each phase ends within it, where `train` is trained with these shares of other examples mixed
/// in; `None` for those that the model is still to make. How many rows they will be packed into is not known, so that such
/// a run is not checked with `packing`.
///
/// # Errors
/// [`crate::error::Error::Input`] names the option; as [`mixed`].
pub(super) fn check_warmups(
    job: &TuneJob,
    train: &[Example],
    mixes: &[(Mix, f64, Option<Vec<Example>>)],
) -> Result<()> {
    let shared = &job.recipe.shared;
    let phases: Vec<_> = job.mods.iter().map(|_| &job.recipe.mods_phase).chain([&job.recipe.all_phase]).collect();
    let unknown = shared.packing && mixes.iter().any(|(.., examples)| examples.is_none());
    if unknown || phases.iter().all(|phase| phase.lr_warmup_steps == 0) {
        return Ok(());
    }
    let to_be_made = || vec![Example { tokens: vec![0, 0], trained: vec![false, true], replayed: true }];
    let more = mixes.iter().map(|(what, share, examples)| (*what, *share, examples.clone().unwrap_or_else(to_be_made)));
    // What screening will leave out is not known: a warm-up that is too long without it is too long with it.
    let loader = shared.load(mixed(train.to_vec(), more.collect(), shared.seed, Ok)?)?;
    phases.into_iter().try_for_each(|phase| phase.check_warmup(phase.steps_of(&loader, shared)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modules::ModuleSet;

    /// By hand: 9 rows with a tenth of answers are 10, in batches of 2 with 2 to a step 5 batches and 3 steps an epoch.
    #[test]
    fn answers_that_are_still_to_be_made_count() {
        let row = Example { tokens: vec![1, 2], trained: vec![false, true], replayed: false };
        let train = vec![row; 9];
        let mut job = TuneJob::default();
        (job.recipe.shared.batch_size, job.recipe.shared.grad_accum) = (2, 2);
        (job.recipe.all_phase.epochs, job.recipe.all_phase.lr_warmup_steps) = (Some(2), 5);
        check_warmups(&job, &train, &[(Mix::Replay, 0.1, None)]).unwrap();
        job.recipe.all_phase.lr_warmup_steps = 6;
        let error = check_warmups(&job, &train, &[(Mix::Replay, 0.1, None)]).unwrap_err().to_string();
        assert!(error.contains("6 steps of warm-up in a phase of 6"), "{error}");
        // A fifth of 9 and 2 answers, 11 rows in 6 batches, are 3 steps; four tenths, 15 rows in 8 batches, are 4.
        assert!(check_warmups(&job, &train, &[(Mix::Replay, 0.2, None)]).is_err());
        check_warmups(&job, &train, &[(Mix::Replay, 0.4, None)]).unwrap();
        job.recipe.shared.packing = true;
        check_warmups(&job, &train, &[(Mix::Replay, 0.1, None)]).unwrap();
        // Two rows of two tokens in one of four: 5 rows, 3 batches, 2 steps.
        job.recipe.shared.max_length = 4;
        assert!(check_warmups(&job, &train, &[]).is_err());
        job.recipe.all_phase.lr_warmup_steps = 3;
        check_warmups(&job, &train, &[]).unwrap();
        // Each phase has its own length.
        (job.mods, job.recipe.mods_phase.steps) = (Some(ModuleSet::default()), Some(3));
        job.recipe.mods_phase.lr_warmup_steps = 3;
        assert!(
            check_warmups(&job, &train, &[]).unwrap_err().to_string().contains("3 steps of warm-up in a phase of 3")
        );
    }
}
