//! Masked AdamW and the sums of squares.

use super::part::{Part, assert_no_worse};
use super::*;
use swat::backend::cuda::{Bf16State, Cuda, F32State, Precision, with_version};
use swat::rng::words;

const HYPER: AdamW = AdamW {
    beta1: 0.9,
    beta2: 0.999,
    eps: 1e-8,
    step: 1,
    max_grad_norm: None,
    seed: 0x1234_5678_9abc_def0,
    rounding: Rounding::Stochastic,
};
struct Module<B: Backend> {
    weight: Part<B, B::Float>,
    grad: Part<B, B::Grad>,
    m: Part<B, B::Moment>,
    v: Part<B, B::Moment>,
    lr: f32,
    weight_decay: f32,
}

impl<B: Backend> Module<B> {
    /// Normals; `i` selects them. The offsets are those of weight, gradient and moments.
    fn new(b: &B, i: usize, len: usize, offsets: [usize; 4]) -> Self {
        let stream = 10 * i as u64;
        let squares: Vec<f64> = normals(stream + 3, len).iter().map(|x| x * x).collect();
        Self {
            weight: Part::new(b, &normals(stream, len), offsets[0]),
            grad: Part::new(b, &normals(stream + 1, len), offsets[1]),
            m: Part::new(b, &normals(stream + 2, len), offsets[2]),
            v: Part::new(b, &squares, offsets[3]),
            lr: [1e-3, 2e-3, 1e-4][i % 3],
            weight_decay: [0.0, 0.1, 0.01][i % 3],
        }
    }

    fn row(&mut self) -> AdamWModule<'_, B> {
        AdamWModule {
            weight: self.weight.view_mut(),
            grad: self.grad.view(),
            m: self.m.view_mut(),
            v: self.v.view_mut(),
            lr: self.lr,
            weight_decay: self.weight_decay,
        }
    }

    fn state(&self, b: &B) -> State {
        State { w: self.weight.get(b), m: self.m.get(b), v: self.v.get(b) }
    }
}

const OFFSETS: [[usize; 4]; 7] = [[0; 4], [1, 0, 0, 0], [8; 4], [0, 3, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1], [1, 2, 3, 5]];

/// Modules of these lengths, each with none, one or all of its tensors off the grid of 16 bytes.
fn modules<B: Backend>(b: &B, lengths: &[usize]) -> Vec<Module<B>> {
    lengths.iter().enumerate().map(|(i, len)| Module::new(b, i, *len, OFFSETS[i % OFFSETS.len()])).collect()
}

fn squares_of<B: Backend>(b: &B, modules: &[Module<B>]) -> Tensor<B, f32> {
    let mut squares = put::<B, f32>(b, &vec![f64::NAN; modules.len()]);
    let parts: Vec<_> = modules.iter().map(|m| m.grad.view()).collect();
    SumSquares { parts: &parts, squares: squares.device.view_mut() }.run(b).unwrap();
    squares
}

fn step<B: Backend>(b: &B, modules: &mut [Module<B>], hyper: AdamW) -> Vec<f64> {
    let squares = squares_of(b, modules);
    let mut table: Vec<_> = modules.iter_mut().map(Module::row).collect();
    AdamWMasked { table: &mut table, squares: squares.device.view(), hyper }.run(b).unwrap();
    get(b, &squares.device)
}

#[derive(Clone, Debug, PartialEq)]
struct State {
    w: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
}

/// The step as written, in f64.
fn exact_step(state: &mut State, grad: &[f64], lr: f32, weight_decay: f32, clip: f64, hyper: &AdamW) {
    let (b1, b2) = (hyper.beta1 as f64, hyper.beta2 as f64);
    let correction = |beta: f64| 1.0 - beta.powi(hyper.step as i32);
    let (lr, decay) = (lr as f64, weight_decay as f64);
    let State { w, m, v } = state;
    for e in 0..w.len() {
        let g = grad[e] * clip;
        w[e] *= 1.0 - lr * decay;
        m[e] = b1 * m[e] + (1.0 - b1) * g;
        v[e] = b2 * v[e] + (1.0 - b2) * g * g;
        let denominator = v[e].sqrt() / correction(b2).sqrt() + hyper.eps as f64;
        w[e] -= lr / correction(b1) * m[e] / denominator;
    }
}

/// Rounds as the backend stores: tensor 0 is the weight, 1 and 2 are the moments.
fn stored<T: FloatElement>(x: &mut [f64], hyper: &AdamW, module: usize, tensor: u64) {
    let stream = (hyper.step as u64) << 32 | tensor << 30 | module as u64;
    for (i, x) in x.iter_mut().enumerate() {
        let narrow = *x as f32;
        *x = if T::NAME == "f32" || hyper.rounding == Rounding::Nearest {
            T::from_f32(narrow).to_f32() as f64
        } else {
            let word = words(hyper.seed, stream, i as u64 / 8)[i % 8 / 2];
            let bits = if i % 2 == 0 { word & 0xffff } else { word >> 16 };
            f32::from_bits((narrow.to_bits() + bits) & 0xffff_0000) as f64
        };
    }
}

fn clip(grads: &[&[f64]], max_grad_norm: Option<f32>) -> f64 {
    let norm = grads.iter().flat_map(|g| g.iter()).map(|g| g * g).sum::<f64>().sqrt();
    max_grad_norm.map_or(1.0, |most| (most as f64 / (norm + 1e-6)).min(1.0))
}

/// Ten steps with new gradients each, clipped and not, in both roundings.
fn ten_steps<B: Backend>(b: &B) {
    for (rounding, max_grad_norm, first) in [
        (Rounding::Stochastic, Some(1.0), 0),
        (Rounding::Stochastic, None, 5000),
        (Rounding::Nearest, Some(1e9), 0),
        (Rounding::Nearest, Some(0.5), 90),
    ] {
        let mut modules = modules(b, &[1, 100, 16_385, 9, 4097, 1000, 4096]);
        let mut exact: Vec<State> = modules.iter().map(|m| m.state(b)).collect();
        let mut emulated = exact.clone();
        for number in 1..=10 {
            let hyper = AdamW { step: first + number, max_grad_norm, rounding, ..HYPER };
            for (i, module) in modules.iter_mut().enumerate() {
                let stream = 1000 + 10 * u64::from(number) + i as u64;
                module.grad.set(b, &normals(stream, module.weight.host().len()));
            }
            let squares = step(b, &mut modules, hyper);
            let grads: Vec<_> = modules.iter().map(|m| m.grad.host()).collect();
            let exact_squares: Vec<f64> = grads.iter().map(|g| g.iter().map(|g| g * g).sum()).collect();
            let narrowed: Vec<f64> = exact_squares.iter().map(|s| *s as f32 as f64).collect();
            assert_no_worse(&squares, &narrowed, &exact_squares, 1e-7, "squares");
            let clip = clip(&grads, max_grad_norm);
            for (i, module) in modules.iter().enumerate() {
                let Module { lr, weight_decay, .. } = *module;
                exact_step(&mut exact[i], grads[i], lr, weight_decay, clip, &hyper);
                exact_step(&mut emulated[i], grads[i], lr, weight_decay, clip, &hyper);
                stored::<B::Float>(&mut emulated[i].w, &hyper, i, 0);
                stored::<B::Moment>(&mut emulated[i].m, &hyper, i, 1);
                stored::<B::Moment>(&mut emulated[i].v, &hyper, i, 2);
            }
        }
        for (i, module) in modules.iter().enumerate() {
            let got = module.state(b);
            let what = |name| format!("{name} of module {i}, {rounding:?}, clip {max_grad_norm:?}");
            assert_no_worse(&got.m, &emulated[i].m, &exact[i].m, 2e-6, &what("m"));
            assert_no_worse(&got.v, &emulated[i].v, &exact[i].v, 2e-6, &what("v"));
            assert_no_worse(&got.w, &emulated[i].w, &exact[i].w, 2e-6, &what("w"));
        }
    }
}

/// The bits of one step are those that the documented words round to, but where f32 arithmetic meets a threshold.
fn random_bits_are_those_documented<B: Backend>(b: &B) {
    let mut modules = modules(b, &[40, 2000, 1001, 100, 100, 100, 100]);
    let hyper = AdamW { step: 3, ..HYPER };
    let mut emulated: Vec<State> = modules.iter().map(|m| m.state(b)).collect();
    step(b, &mut modules, hyper);
    for (i, (module, state)) in modules.iter().zip(&mut emulated).enumerate() {
        exact_step(state, module.grad.host(), module.lr, module.weight_decay, 1.0, &hyper);
        stored::<B::Float>(&mut state.w, &hyper, i, 0);
        stored::<B::Moment>(&mut state.m, &hyper, i, 1);
        stored::<B::Moment>(&mut state.v, &hyper, i, 2);
        let got = module.state(b);
        let tensors = [(&got.w, &state.w), (&got.m, &state.m), (&got.v, &state.v)];
        for (tensor, (got, expected)) in tensors.into_iter().enumerate() {
            // Thresholds are 2⁻¹⁶ of a unit apart: the roundings of f32 cross one in a few thousand elements.
            let far = got.iter().zip(expected).filter(|(g, e)| (*g - *e).abs() > 1e-6 + 4e-7 * e.abs()).count();
            assert!(far <= got.len() / 200, "tensor {tensor} of module {i}: {far} of {} differ", got.len());
        }
    }
}

fn tables_of_any_size<B: Backend>(b: &B) {
    for count in [1, 2, 33, 200, 300] {
        let lengths: Vec<usize> = (0..count).map(|i| [1, 7, 8, 9, 0, 64, 33][i % 7]).chain([4097]).collect();
        let mut modules = modules(b, &lengths);
        let hyper = AdamW { max_grad_norm: Some(0.3), step: 2, rounding: Rounding::Nearest, ..HYPER };
        let before: Vec<State> = modules.iter().map(|m| m.state(b)).collect();
        let squares = step(b, &mut modules, hyper);
        let grads: Vec<_> = modules.iter().map(|m| m.grad.host()).collect();
        let clip = clip(&grads, hyper.max_grad_norm);
        for (i, module) in modules.iter().enumerate() {
            let exact_square: f64 = grads[i].iter().map(|g| g * g).sum();
            assert!((squares[i] - exact_square).abs() <= 1e-6 * exact_square, "{}: {exact_square}", squares[i]);
            let mut exact = before[i].clone();
            exact_step(&mut exact, grads[i], module.lr, module.weight_decay, clip, &hyper);
            let mut emulated = exact.clone();
            stored::<B::Float>(&mut emulated.w, &hyper, i, 0);
            assert_no_worse(&module.weight.get(b), &emulated.w, &exact.w, 2e-6, &format!("module {i} of {count}"));
        }
    }
}

/// Weights of 1 that decay to 1 − 2⁻¹⁰, a quarter of bf16's way to its neighbour: their mean is what counts.
fn rounding_is_unbiased<B: Backend>(b: &B) {
    const LEN: usize = 4099;
    const SEEDS: u64 = 12;
    let target = 1.0 - 2f64.powi(-10);
    let (mut up, mut patterns) = (0, Vec::new());
    for seed in 0..SEEDS {
        let mut modules = modules::<B>(b, &[LEN, LEN]);
        for module in &mut modules {
            module.weight.set(b, &[1.0; LEN]);
            module.m.set(b, &[0.0; LEN]);
            module.v.set(b, &[0.0; LEN]);
            module.grad.set(b, &[0.0; LEN]);
            (module.lr, module.weight_decay) = (2f32.powi(-5), 2f32.powi(-5));
        }
        step(b, &mut modules, AdamW { seed, step: 1 + seed as u32 % 3, ..HYPER });
        for module in &modules {
            let got = module.weight.get(b);
            if B::Float::NAME == "f32" {
                assert!(got.iter().all(|w| *w == target), "f32 needs no rounding");
                continue;
            }
            let (low, high) = (1.0 - 2f64.powi(-8), 1.0);
            assert!(got.iter().all(|w| *w == low || *w == high), "only the neighbours");
            up += got.iter().filter(|w| **w == high).count();
            patterns.push(got);
        }
    }
    if B::Float::NAME == "f32" {
        return;
    }
    let draws = (LEN as u64 * 2 * SEEDS) as f64;
    let deviation = (draws * 0.75 * 0.25).sqrt();
    assert!((up as f64 - 0.75 * draws).abs() < 4.0 * deviation, "{up} of {draws} up");
    for (i, pattern) in patterns.iter().enumerate() {
        assert!(patterns[..i].iter().all(|other| other != pattern), "every seed and module draws anew");
    }
}

/// A second moment of 1 without gradients: to nearest, bf16 could never leave it.
fn second_moments_decay<B: Backend>(b: &B) {
    const LEN: usize = 512;
    let steps = 100;
    let decayed = |rounding| {
        let mut modules = modules::<B>(b, &[LEN]);
        modules[0].grad.set(b, &[0.0; LEN]);
        modules[0].v.set(b, &[1.0; LEN]);
        for number in 1..=steps {
            step(b, &mut modules, AdamW { step: number, rounding, ..HYPER });
        }
        modules[0].v.get(b).iter().sum::<f64>() / LEN as f64
    };
    let exact = f64::from(HYPER.beta2).powi(steps as i32);
    let mean = decayed(Rounding::Stochastic);
    assert!((mean / exact - 1.0).abs() < 0.004, "{mean}, exact {exact}");
    if B::Moment::NAME == "bf16" {
        assert_eq!(decayed(Rounding::Nearest), 1.0);
    }
}

/// Averages to the bit of three roundings; gradients within one rounding of the pull.
fn means_and_pulls<B: Backend>(b: &B) {
    for lengths in [&[1, 100, 0, 16_385, 9, 4097, 1000, 4096][..], &[70_001], &[5; 300]] {
        let mut modules = modules(b, lengths);
        let part =
            |i: usize, stream, len| Part::<B, f32>::new(b, &normals(stream + i as u64, len), [0, 1, 4, 3][i % 4]);
        let mut means: Vec<_> = lengths.iter().enumerate().map(|(i, len)| part(i, 4000, *len)).collect();
        let anchor = |i: usize, len| Part::<B, B::Float>::new(b, &normals(5000 + i as u64, len), [0, 8, 2][i % 3]);
        let anchors: Vec<_> = lengths.iter().enumerate().map(|(i, len)| anchor(i, *len)).collect();
        for decay in [0.75f32, 0.999] {
            let rows = means.iter_mut().zip(&modules);
            let mut table: Vec<_> =
                rows.map(|(mean, module)| MeanRow { mean: mean.view_mut(), weight: module.weight.view() }).collect();
            let before: Vec<Vec<f64>> = table.iter().map(|row| host(b, &row.mean)).collect();
            UpdateMeans { table: &mut table, decay }.run(b).unwrap();
            for (i, before) in before.iter().enumerate() {
                let plain =
                    |(mean, weight): (&f64, &f64)| f64::from(decay * *mean as f32 + (1.0 - decay) * *weight as f32);
                let expected: Vec<f64> = before.iter().zip(modules[i].weight.host()).map(plain).collect();
                assert_eq!(means[i].get(b), expected, "module {i} of {lengths:?}");
            }
        }
        let rows = modules.iter_mut().zip(&anchors);
        let mut table: Vec<_> = rows
            .map(|(module, anchor)| ProximalRow {
                grad: module.grad.view_mut(),
                weight: module.weight.view(),
                anchor: anchor.view(),
            })
            .collect();
        let rho = 0.3f32;
        ProximalGradients { table: &mut table, rho }.run(b).unwrap();
        for (i, (module, anchor)) in modules.iter().zip(&anchors).enumerate() {
            let tensors = module.grad.host().iter().zip(module.weight.host()).zip(anchor.host());
            let exact: Vec<f64> = tensors.map(|((g, w), a)| g + f64::from(rho) * (w - a)).collect();
            let stored: Vec<f64> = exact.iter().map(|x| B::Grad::from_f32(*x as f32).to_f32() as f64).collect();
            assert_no_worse(&module.grad.get(b), &stored, &exact, 3e-7, &format!("module {i} of {lengths:?}"));
        }
    }
}

/// A weight of 2 with an average of 4 and an anchor of 1.
fn means_and_pulls_by_hand<B: Backend>(b: &B) {
    let (weight, anchor) = (put::<B, B::Float>(b, &[2.0]), put::<B, B::Float>(b, &[1.0]));
    let (mut mean, mut grad) = (put::<B, f32>(b, &[4.0]), put::<B, B::Grad>(b, &[0.5]));
    let row = MeanRow { mean: mean.device.view_mut(), weight: weight.device.view() };
    UpdateMeans { table: &mut [row], decay: 0.75 }.run(b).unwrap();
    assert_eq!(get(b, &mean.device), [3.5]);
    let row = ProximalRow { grad: grad.device.view_mut(), weight: weight.device.view(), anchor: anchor.device.view() };
    ProximalGradients { table: &mut [row], rho: 0.25 }.run(b).unwrap();
    assert_eq!(get(b, &grad.device), [0.75]);
}

/// A view's numbers in f64.
fn host<B: Backend>(b: &B, view: &ViewMut<'_, B, f32>) -> Vec<f64> {
    let mut values = vec![0f32; view.len()];
    b.read(View { storage: &*view.storage, range: view.range.clone() }, &mut values).unwrap();
    values.into_iter().map(f64::from).collect()
}

fn the_same_bytes_twice<B: Backend>(b: &B) {
    let run = || {
        let mut modules = modules::<B>(b, &[100, 20_001, 7]);
        for number in 1..=3 {
            step(b, &mut modules, AdamW { step: number, max_grad_norm: Some(1.0), ..HYPER });
        }
        modules.iter().map(|m| m.state(b)).collect::<Vec<_>>()
    };
    assert_eq!(run(), run());
}

fn nothing_changes_where_a_gradient_is_not_finite<B: Backend>(b: &B) {
    for (broken, max_grad_norm) in [(f64::NAN, None), (f64::INFINITY, Some(1.0)), (f64::NEG_INFINITY, None)] {
        let mut modules = modules(b, &[1, 100, 16_390]);
        let mut gradient = modules[1].grad.host().to_vec();
        gradient[17] = broken;
        modules[1].grad.set(b, &gradient);
        let before: Vec<_> = modules.iter().map(|m| m.state(b)).collect();
        let squares = step(b, &mut modules, AdamW { max_grad_norm, ..HYPER });
        assert!(!squares[1].is_finite() && squares[0].is_finite() && squares[2].is_finite());
        assert_eq!(modules.iter().map(|m| m.state(b)).collect::<Vec<_>>(), before);
    }
}

fn rate_zero_keeps_the_weight<B: Backend>(b: &B) {
    for rounding in [Rounding::Stochastic, Rounding::Nearest] {
        let mut modules = modules(b, &[1, 100, 4097]);
        modules[1].lr = 0.0;
        step(b, &mut modules, AdamW { rounding, step: 4, ..HYPER });
        assert_eq!(modules[1].weight.get(b), modules[1].weight.host());
        assert_ne!(modules[2].weight.get(b), modules[2].weight.host());
    }
}

/// Rates that change from step to step, in tables that stay.
fn every_step_has_its_own_rate<B: Backend>(b: &B) {
    let mut modules = modules(b, &[300, 41]);
    let mut before: Vec<_> = modules.iter().map(|m| m.weight.get(b)).collect();
    for (number, lr) in [0.0f32, 0.5, 0.0, 0.25].into_iter().enumerate() {
        modules.iter_mut().for_each(|m| m.lr = lr);
        step(b, &mut modules, AdamW { step: 1 + number as u32, ..HYPER });
        let after: Vec<_> = modules.iter().map(|m| m.weight.get(b)).collect();
        assert_eq!(after == before, lr == 0.0, "rate {lr}");
        before = after;
    }
}

/// A sum in which f32 accumulation would be far off.
fn sum_of_many_squares<B: Backend>(b: &B) {
    let len = 3_000_001;
    let part = put::<B, f32>(b, &vec![0.1; len]);
    let mut squares = put::<B, f32>(b, &[0.0]);
    SumSquares { parts: &[part.device.view()], squares: squares.device.view_mut() }.run(b).unwrap();
    let exact = len as f64 * part.host[0] * part.host[0];
    let got = get(b, &squares.device)[0];
    assert!((got / exact - 1.0).abs() < 1e-7, "{got}, exact {exact}");
}

/// Sizes around vectors, rounds and chunks, aligned and not; an empty part and no parts.
fn sums_of_any_length<B: Backend, T: FloatElement>(b: &B) {
    let parts: Vec<Part<B, T>> = [0, 1, 7, 8, 9, 2047, 2049, 16_383, 16_384, 16_385, 40_000]
        .iter()
        .flat_map(|len| [0, 1, 8].map(|offset| Part::new(b, &normals(5, *len), offset)))
        .collect();
    let views: Vec<_> = parts.iter().map(Part::view).collect();
    let mut squares = put::<B, f32>(b, &vec![f64::NAN; parts.len()]);
    SumSquares { parts: &views, squares: squares.device.view_mut() }.run(b).unwrap();
    for (part, got) in parts.iter().zip(get(b, &squares.device)) {
        let exact: f64 = part.host().iter().map(|x| x * x).sum();
        let what = format!("{} elements {} in", part.host().len(), part.offset);
        assert!((got - exact).abs() <= 1.3e-7 * exact, "{what}: {got}, exact {exact}");
    }
    SumSquares::<B, T> { parts: &[], squares: b.zeros(0).unwrap().view_mut() }.run(b).unwrap();
}

fn sums_in_f32<B: Backend>(b: &B) {
    sums_of_any_length::<B, f32>(b);
}

fn sums_in_bf16<B: Backend>(b: &B) {
    sums_of_any_length::<B, half::bf16>(b);
}

/// f32 gradients and bf16 moments, and the other way round: the forms that no other test runs.
struct NarrowMoments;
struct NarrowGradients;
impl Precision for NarrowMoments {
    type Grad = f32;
    type Moment = half::bf16;
}
impl Precision for NarrowGradients {
    type Grad = half::bf16;
    type Moment = f32;
}

#[test]
fn mixed_forms() {
    standin::open::<NarrowMoments>(0).iter().for_each(ten_steps);
    standin::open::<NarrowGradients>(2).iter().for_each(ten_steps);
    standin::open::<NarrowMoments>(1).iter().for_each(random_bits_are_those_documented);
}

/// The versions differ in nothing that they write.
fn baseline_writes_the_same<P: Precision>(ordinal: u32) {
    let Some(b) = standin::open::<P>(ordinal) else { return };
    for rounding in [Rounding::Stochastic, Rounding::Nearest] {
        let hyper = AdamW { step: 9, max_grad_norm: Some(2.0), rounding, ..HYPER };
        let [mut first, mut second] = [(), ()].map(|()| modules::<Cuda<P>>(&b, &[1, 0, 1000, 16_500]));
        let expected = step(&b, &mut first, hyper);
        let mut squares = put::<_, f32>(&b, &vec![f64::NAN; second.len()]);
        let parts: Vec<_> = second.iter().map(|m| m.grad.view()).collect();
        with_version("baseline", || SumSquares { parts: &parts, squares: squares.device.view_mut() }.run(&b)).unwrap();
        assert_no_worse(&get(&b, &squares.device), &expected, &expected, 1.2e-7, "squares");
        b.write(&expected.iter().map(|s| *s as f32).collect::<Vec<_>>(), squares.device.view_mut()).unwrap();
        let mut table: Vec<_> = second.iter_mut().map(Module::row).collect();
        with_version("baseline", || AdamWMasked { table: &mut table, squares: squares.device.view(), hyper }.run(&b))
            .unwrap();
        for (first, second) in first.iter().zip(&second) {
            assert!(first.state(&b) == second.state(&b), "{} elements", first.weight.host().len());
        }
    }
}

#[test]
fn baselines() {
    baseline_writes_the_same::<F32State>(0);
    baseline_writes_the_same::<Bf16State>(1);
    baseline_writes_the_same::<NarrowMoments>(2);
    baseline_writes_the_same::<NarrowGradients>(3);
}

/// After the first step there is nothing to allocate, whichever tables take turns.
#[test]
fn later_steps_need_no_memory() {
    let Some(b) = standin::open::<F32State>(1) else { return };
    let mut all = [vec![100, 3000], vec![50], vec![7, 20_000, 9]].map(|lengths| modules(&b, &lengths));
    let mut round = |number| all.iter_mut().for_each(|m| drop(step(&b, m, AdamW { step: number, ..HYPER })));
    round(1);
    let peak = b.peak_bytes();
    (2..6).for_each(&mut round);
    assert_eq!(b.peak_bytes(), peak);
}

/// More tables in turn than the device keeps.
#[test]
fn many_tables_take_turns() {
    let Some(b) = standin::open::<Bf16State>(0) else { return };
    let mut tables: Vec<_> = (1..12).map(|i| modules(&b, &[i, 3 * i])).collect();
    let mut alone: Vec<_> = (1..12).map(|i| modules(&b, &[i, 3 * i])).collect();
    for number in 1..4 {
        tables.iter_mut().for_each(|m| drop(step(&b, m, AdamW { step: number, ..HYPER })));
    }
    for (table, alone) in tables.iter().zip(&mut alone) {
        for number in 1..4 {
            step(&b, alone, AdamW { step: number, ..HYPER });
        }
        assert!(table.iter().zip(&*alone).all(|(x, y)| x.state(&b) == y.state(&b)));
    }
}

on_every_backend!(
    ten_steps,
    random_bits_are_those_documented,
    tables_of_any_size,
    rounding_is_unbiased,
    second_moments_decay,
    means_and_pulls,
    means_and_pulls_by_hand,
    the_same_bytes_twice,
    nothing_changes_where_a_gradient_is_not_finite,
    rate_zero_keeps_the_weight,
    every_step_has_its_own_rate,
    sum_of_many_squares,
    sums_in_f32,
    sums_in_bf16
);
