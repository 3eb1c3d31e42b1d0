//! The projection onto the alignment of a module, C = V·Vᵀ / ‖V‖_F, and how much of an update lies in it.
//!
//! Source: SafeLoRA (Hsu et al., arXiv 2405.16833). V = W_aligned − W_unaligned, [outputs, inputs]. C is as the paper
//! has it, no orthogonal projector: an update along V grows by the factor ‖V‖_F. Its cosine does not depend on that
//! factor, and lies in 0 … 1, as V·Vᵀ has no negative eigenvalue.

use super::{each, norm, sum_of_products};
use crate::backend::cpu::Cpu;
use crate::backend::{Backend, Buffer, Linear, LinearBackwardInput, LinearBackwardWeight, LinearShape, Operator};
use crate::error::Result;

/// An update ΔW through the projection.
pub(super) struct Projected {
    /// C·ΔW, [outputs, inputs].
    pub(super) values: Vec<f32>,
    /// Cosine of ΔW and C·ΔW; 0 where the latter is zero.
    pub(super) cosine: f64,
}

/// Projects an update [outputs, inputs] by `v` of the same shape; `None` where either is zero, and nothing is projected.
///
/// The smaller of V·Vᵀ and Vᵀ·ΔW is the intermediate result: at most min(outputs, inputs)² more values.
pub(super) fn project(mut v: Vec<f32>, update: &[f32], (outputs, inputs): (usize, usize)) -> Result<Option<Projected>> {
    let (v_norm, update_norm) = (norm(&v), norm(update));
    if v_norm == 0.0 || update_norm == 0.0 {
        return Ok(None);
    }
    // V / ‖V‖_F, whose products neither overflow nor vanish; C is ‖V‖_F times what they give.
    each(&mut v, [], |v, []| v / v_norm);
    let cpu = Cpu::new();
    let (v, update_there) = (upload(&cpu, &v)?, upload(&cpu, update)?);
    let mut result: Buffer<Cpu, f32> = cpu.zeros(outputs * inputs)?;
    if outputs <= inputs {
        let mut square = cpu.zeros(outputs * outputs)?;
        let shape = LinearShape { tokens: outputs, inputs, outputs };
        Linear::new(v.view(), v.view(), square.view_mut(), shape).run(&cpu)?;
        let shape = LinearShape { tokens: outputs, inputs, outputs };
        LinearBackwardInput::new(square.view(), update_there.view(), result.view_mut(), shape).run(&cpu)?;
    } else {
        let mut square = cpu.zeros(inputs * inputs)?;
        let shape = LinearShape { tokens: outputs, inputs, outputs: inputs };
        LinearBackwardWeight::new(v.view(), update_there.view(), square.view_mut(), shape).run(&cpu)?;
        LinearBackwardInput::new(v.view(), square.view(), result.view_mut(), shape).run(&cpu)?;
    }
    let mut values = vec![0.0; outputs * inputs];
    cpu.read(result.view(), &mut values)?;
    let projected_norm = norm(&values);
    let cosine = match projected_norm > 0.0 {
        true => sum_of_products(update, &values) / (update_norm * projected_norm),
        false => 0.0,
    };
    each(&mut values, [], |value, []| value * v_norm);
    Ok(Some(Projected { values, cosine }))
}

fn upload(cpu: &Cpu, values: &[f32]) -> Result<Buffer<Cpu, f32>> {
    let mut buffer = cpu.zeros(values.len())?;
    cpu.write(values, buffer.view_mut())?;
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: &[f32], expected: &[f32]) {
        let near = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-5;
        assert!(found.len() == expected.len() && found.iter().zip(expected).all(near), "{found:?}");
    }

    #[test]
    fn a_square_module_by_hand() {
        // ‖V‖ = 5, V·Vᵀ = diag(9, 16), C = diag(1.8, 3.2).
        let found = project(vec![3.0, 0.0, 0.0, 4.0], &[1.0, 1.0, 1.0, -1.0], (2, 2)).unwrap().unwrap();
        close(&found.values, &[1.8, 1.8, 3.2, -3.2]);
        // 10 / (2 · √26.96).
        assert!((found.cosine - 0.962_964).abs() < 1e-5, "{}", found.cosine);
    }

    #[test]
    fn wide_and_tall_modules_by_hand() {
        // V·Vᵀ = 25, C = 5.
        let wide = project(vec![3.0, 4.0], &[1.0, -2.0], (1, 2)).unwrap().unwrap();
        close(&wide.values, &[5.0, -10.0]);
        assert!((wide.cosine - 1.0).abs() < 1e-6);
        // C = [[9, 12], [12, 16]] / 5 on (1, −0.5): (9 − 6, 12 − 8) / 5; cosine 0.2 / (√1.25 · 1).
        let tall = project(vec![3.0, 4.0], &[1.0, -0.5], (2, 1)).unwrap().unwrap();
        close(&tall.values, &[0.6, 0.8]);
        assert!((tall.cosine - 0.178_885).abs() < 1e-5, "{}", tall.cosine);
        // Orthogonal to V.
        let none = project(vec![3.0, 4.0], &[4.0, -3.0], (2, 1)).unwrap().unwrap();
        assert!(none.cosine.abs() < 1e-6);
    }

    #[test]
    fn without_alignment_or_update_there_is_nothing_to_project() {
        assert!(project(vec![0.0; 2], &[1.0, 2.0], (2, 1)).unwrap().is_none());
        assert!(project(vec![1.0; 2], &[0.0; 2], (2, 1)).unwrap().is_none());
    }
}
