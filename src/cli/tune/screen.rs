//! Screening of the data before a tuning run.

use super::{Common, Tune};
use crate::backend::{Backend, Element};
use crate::cli::progress::Bars;
use crate::data::{Example, RowReader};
use crate::error::{Error, Result};
use crate::group::{Group, from_first};
use crate::model::Clock;
use crate::report::format::percent;
use crate::secure::{
    Mix, ModelText, OpenOutput, RefusalList, RefusedExamples, ScreenCounts, Screening, TuneJob, Watch, mixed,
};
use std::path::Path;

/// Examples that are mixed in, with their kind and share.
type MixedIn = (Mix, f64, Vec<Example>);

impl Tune {
    /// What the original model refuses of the data, attack examples among them: kept by the unfinished run that is resumed,
    /// or found by rank 0.
    pub(super) fn screening<B: Backend>(
        &self,
        (common, text, date): (&Common, &ModelText, Option<Clock>),
        (output, job, watch): (&OpenOutput, &TuneJob, Option<&Watch>),
        (data, more): (&[Example], &[MixedIn]),
        (group, backend): (&dyn Group<B>, &B),
    ) -> Result<Screening> {
        if let Some(path) = self.data.iter().chain(&self.attack).find(|path| !path.is_file()) {
            let expected = "a file: rows that are left out are copied from it";
            return Err(Error::input(path.display().to_string(), "a stream, which can be read only once", expected));
        }
        output.check_screened(&self.inputs())?;
        let all = mixed(data.to_vec(), more.to_vec(), common.seed, Ok)?;
        output.check_room(&text.files, all, job, watch, backend)?;
        let attack = more.iter().filter(|(what, ..)| *what == Mix::Attack).map(|(.., examples)| examples.as_slice());
        let asked: Vec<&[Example]> = std::iter::once(data).chain(attack).collect();
        let refusals = match &self.refusal_expressions {
            Some(path) => RefusalList::read(path)?,
            None => RefusalList::of_languages(&self.refusal_languages),
        };
        let inputs = Screening::inputs(text.files.hash()?, &asked, &refusals, B::Float::NAME);
        let refused = from_first(group, || {
            if let Some(kept) = output.kept_screening(&inputs) {
                return Ok(kept);
            }
            let (text, _) = self.model.open_dated(date)?;
            let model = text.load(backend.clone())?;
            let mut bars = Bars::new(common);
            let mut observer = bars.observer();
            let parts = asked.iter().map(|part| model.refused_examples(part, &refusals, &mut observer));
            let found = parts.collect::<Result<RefusedExamples>>()?;
            drop(observer);
            bars.finish();
            Ok(found)
        })?;
        // Rank 0 alone writes them.
        let lines = if group.share().rank == 0 { self.lines(&refused, text)? } else { String::new() };
        Ok(Screening { inputs, refused, lines })
    }

    /// The rows that are left out.
    fn lines(&self, refused: &RefusedExamples, text: &ModelText) -> Result<String> {
        let (mut rows, max_length) = (RowReader::new(&self.rows), self.recipe.shared.max_length);
        let files = self.data.iter().chain(&self.attack);
        files.map(|path| refused.lines(path, text, max_length, &mut rows)).collect()
    }
}

/// How much was left out, and where it is.
pub(super) fn told(ScreenCounts { examples, left_out }: &ScreenCounts, list: &Path) -> String {
    let share = percent(*left_out as f64 / (*examples).max(1) as f64, 1);
    let counted =
        format!("screened: {left_out} of {examples} examples ({share}) answer what the original model refuses");
    match left_out {
        0 => counted,
        _ => format!("{counted}, and were left out: {}", list.display()),
    }
}
