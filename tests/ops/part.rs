//! Views into larger buffers, and errors held against those of an emulation.

use super::*;

/// What lies around a view: it must stay.
const GUARD: f64 = 77.0;

/// A view of a buffer that begins `offset` elements in and ends as many before its end.
pub(super) struct Part<B: Backend, T: Element> {
    tensor: Tensor<B, T>,
    pub(super) offset: usize,
}

impl<B: Backend, T: FloatElement> Part<B, T> {
    pub(super) fn new(b: &B, values: &[f64], offset: usize) -> Self {
        let guard = vec![GUARD; offset];
        Self { tensor: put(b, &[&guard, values, &guard].concat()), offset }
    }

    pub(super) fn view(&self) -> View<'_, B, T> {
        self.tensor.device.range(self.offset..self.tensor.host.len() - self.offset)
    }

    pub(super) fn view_mut(&mut self) -> ViewMut<'_, B, T> {
        let range = self.offset..self.tensor.host.len() - self.offset;
        self.tensor.device.range_mut(range)
    }

    /// What it was made of, as rounded.
    pub(super) fn host(&self) -> &[f64] {
        &self.tensor.host[self.offset..self.tensor.host.len() - self.offset]
    }

    /// What it holds now; what lies around it is as it was.
    #[track_caller]
    pub(super) fn get(&self, b: &B) -> Vec<f64> {
        let all = get(b, &self.tensor.device);
        let end = all.len() - self.offset;
        assert!(all[..self.offset].iter().chain(&all[end..]).all(|x| *x == GUARD), "written outside the view");
        all[self.offset..end].to_vec()
    }

    pub(super) fn set(&mut self, b: &B, values: &[f64]) {
        *self = Self::new(b, values, self.offset);
    }
}

/// Asserts that neither the largest nor the mean error is above twice that of an emulation, which rounds where the
/// backend does, by more than `tiny` of the largest and the mean size.
#[track_caller]
pub(super) fn assert_no_worse(got: &[f64], emulated: &[f64], exact: &[f64], tiny: f64, what: &str) {
    assert_eq!([got.len(), emulated.len()], [exact.len(); 2], "{what}");
    let errors = |of: &[f64]| of.iter().zip(exact).map(|(x, e)| x - e).collect::<Vec<_>>();
    let (error, reference) = (errors(got), errors(emulated));
    for (name, size) in [("largest", largest as fn(&[f64]) -> f64), ("mean", root_mean_square)] {
        let allowed = 2.0 * size(&reference) + tiny * size(exact);
        assert!(size(&error) <= allowed, "{what}: {name} error {}, allowed {allowed}", size(&error));
    }
}

fn largest(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |most: f64, x| if most >= x.abs() { most } else { x.abs() })
}

fn root_mean_square(x: &[f64]) -> f64 {
    (x.iter().map(|x| x * x).sum::<f64>() / x.len().max(1) as f64).sqrt()
}
