//! Layers of one X in one launch: q, k and v; gate and up. Forward passes and weight gradients are products side by
//! side; the gradient of X is one sum of products.

use super::plan::{self, GemmLayout, GemmPlan, GemmShape, GemmSupport, GemmVersion};
use super::wgmma::{self, Operands};
use super::{Addends, BLOCK, MMA_BLOCK, Product, combine, offer, size};
use crate::backend::cuda::device::Device;
use crate::backend::cuda::launch::{Arg, Launch, args, blocks};
use crate::backend::cuda::memory::{Memory, SliceMut, slice, slice_mut};
use crate::backend::cuda::{Cuda, Precision};
use crate::backend::{
    Cost, FloatElement, InputGradient, LinearBackwardInputEach, LinearBackwardWeightEach, LinearEach, LinearShape,
    Projection, WeightGradient,
};
use crate::error::Result;
use half::bf16;
use std::sync::Arc;

/// Most products of a launch.
const MOST: usize = 3;

/// One product as large as all of them.
fn whole(shapes: &[GemmShape]) -> GemmShape {
    let total = |size: fn(&GemmShape) -> usize| shapes.iter().map(size).sum();
    let first = shapes[0];
    match first.layout {
        GemmLayout::Tn => GemmShape { n: total(|shape| shape.n), ..first },
        GemmLayout::Nn => GemmShape { k: total(|shape| shape.k), ..first },
        GemmLayout::Nt => GemmShape { m: total(|shape| shape.m), ..first },
    }
}

/// The plan of a group in one launch: the forced one, else the plan of one product as large as all of them, where its
/// version has a kernel for groups that can store `outputs`.
fn choose<T: FloatElement>(device: &Device, operands: &[Operands], outputs: &[wgmma::Output<T>]) -> Option<GemmPlan> {
    let shapes: Vec<GemmShape> = operands.iter().map(|operands| operands.shape).collect();
    let offers = operands.iter().map(|Operands { a, b, .. }| offer(device, [*a, *b]));
    let offer = offers.reduce(|x, y| GemmSupport { aligned: x.aligned && y.aligned, ..x })?;
    let stored = GemmSupport { hopper: offer.hopper && wgmma::groups(outputs), ..offer };
    let supported = |version: GemmVersion| {
        !matches!(version, GemmVersion::Baseline | GemmVersion::Scalar64)
            && (2..=MOST).contains(&shapes.len())
            && shapes.iter().all(|shape| version.supports(*shape, stored))
    };
    if let Some(plan) = plan::forced() {
        assert!(plan.splits > 0 && supported(plan.version), "{plan:?} of {shapes:?}");
        return Some(plan);
    }
    if shapes.iter().any(|shape| shape.m * shape.n == 0) {
        return None;
    }
    let plan = plan::choose(whole(&shapes), offer, device.multiprocessors);
    supported(plan.version).then_some(plan)
}

/// Arguments of the members, padded with `none`.
fn padded(values: impl Iterator<Item = Arg>, none: Arg) -> [Arg; MOST] {
    let mut all = [none; MOST];
    all.iter_mut().zip(values).for_each(|(to, value)| *to = value);
    all
}

fn pointers(values: impl Iterator<Item = Arg>) -> [Arg; MOST] {
    padded(values, Arg::Pointer(0))
}

fn sizes(values: impl Iterator<Item = usize>) -> [Arg; MOST] {
    padded(values.map(|value| Arg::U32(size(value))), Arg::U32(0))
}

/// Memory for the sums of the parts of a product.
fn partials(device: &Arc<Device>, splits: u32, shape: GemmShape) -> Result<Memory<f32>> {
    Memory::workspace(device, splits as usize * shape.m * shape.n)
}

/// Products of one layout and depth, whose addends are biases and, for all or none, C: in one launch where there is a
/// plan for that, else one after another.
fn each<T: FloatElement>(device: &Arc<Device>, products: &[Product<T>]) -> Result<()> {
    let shapes: Vec<GemmShape> = products.iter().map(|product| product.shape).collect();
    for product in products {
        product.check();
        assert_eq!((product.shape.layout, product.shape.k), (shapes[0].layout, shapes[0].k), "{shapes:?}");
    }
    let operands: Vec<_> =
        products.iter().map(|product| Operands { a: product.a, b: product.b, shape: product.shape }).collect();
    let Some(plan) = choose(device, &operands, &outputs(products, &[])) else {
        return products.iter().try_for_each(|product| product.run(device).map(|_| ()));
    };
    let GemmPlan { version, splits } = plan;
    let whole = whole(&shapes);
    let accumulate = products[0].addends.accumulate;
    let added = products.iter().map(|product| product.addends.bytes(product.c.len(), size_of::<T>())).sum();
    let cost = whole.cost(size_of::<T>()) + Cost::moved(added);
    let a = pointers(products.iter().map(|product| product.a.into()));
    let b = pointers(products.iter().map(|product| product.b.into()));
    let c = pointers(products.iter().map(|product| (&product.c).into()));
    let bias = pointers(products.iter().map(|product| product.addends.bias.into()));
    let n = sizes(shapes.iter().map(|shape| shape.n));
    let k = args![size(whole.k)];
    let Some(tile) = version.tile() else {
        assert!(!accumulate && [1, 2, 4, 8].contains(&splits), "{plan:?}");
        let grid = shapes.iter().map(|shape| blocks(shape.n * splits as usize, plan::DECODE_OUTPUTS)).sum();
        let kernel = symbol::<T>(whole, version);
        let launch = Launch::new("gemm_decode", kernel, [grid], BLOCK, cost);
        let arguments = [&a[..1], &b, &c, &bias, args![size(whole.m)], &n, k, args![splits]].concat();
        // SAFETY: lengths fit the shapes, which the version supports, and X is the same; each C is borrowed mutably.
        return unsafe { device.launch(launch, &arguments) };
    };
    let mut memory = Vec::with_capacity(MOST);
    if splits > 1 {
        memory = shapes.iter().map(|shape| partials(device, splits, *shape)).collect::<Result<_>>()?;
    }
    let sums = memory.iter_mut().zip(&shapes).map(|(memory, shape)| memory.all(splits as usize * shape.m * shape.n));
    let sums: Vec<SliceMut<f32>> = sums.collect();
    let cost = if splits > 1 { whole.cost(4 * splits as usize) } else { cost };
    if let GemmVersion::Wgmma128 | GemmVersion::Wgmma256 = version {
        wgmma::launch(device, &operands, &outputs(products, &sums), plan, cost)?;
    } else {
        let m = sizes(shapes.iter().map(|shape| shape.m));
        let launch = Launch::new(
            "gemm",
            symbol::<T>(whole, version),
            [size(shapes.iter().map(|shape| tile.count(*shape)).sum()), splits],
            MMA_BLOCK,
            cost,
        );
        let parts = pointers(sums.iter().map(Arg::from));
        let arguments = [&a[..], &b, &c, &bias, &parts, args![accumulate as u32], &m, &n, k].concat();
        // SAFETY: lengths fit the shapes, operands are aligned as the version asks, each of `sums` holds the sums of all parts of
        // its product; each C is borrowed mutably.
        unsafe { device.launch(launch, &arguments) }?;
    }
    for (sums, Product { c, shape, addends, .. }) in sums.iter().zip(products) {
        combine(device, sums, splits, c, [shape.m, shape.n], *addends)?;
    }
    Ok(())
}

/// Destinations of products side by side; `sums` are the partial sums, if any.
fn outputs<'a, T>(products: &'a [Product<T>], sums: &'a [SliceMut<f32>]) -> Vec<wgmma::Output<'a, T>> {
    let outputs = products.iter().enumerate().map(|(i, Product { c, shape, addends, .. })| wgmma::Output {
        c,
        partials: sums.get(i),
        addends: *addends,
        shape: *shape,
    });
    outputs.collect()
}

fn symbol<T: FloatElement>(GemmShape { layout, m, .. }: GemmShape, version: GemmVersion) -> &'static str {
    match (layout, T::NAME, version) {
        (GemmLayout::Tn, "bf16", GemmVersion::Mma64) => "gemm_tn_each_mma64_bf16",
        (GemmLayout::Tn, "bf16", GemmVersion::Mma128) => "gemm_tn_each_mma128_bf16",
        (GemmLayout::Tn, "bf16", GemmVersion::Decode) => match m {
            1 => "gemm_tn_each_decode1_bf16",
            2 => "gemm_tn_each_decode2_bf16",
            3..=4 => "gemm_tn_each_decode4_bf16",
            _ => "gemm_tn_each_decode8_bf16",
        },
        (GemmLayout::Nt, "bf16", GemmVersion::Mma64) => "gemm_nt_each_mma64_bf16",
        (GemmLayout::Nt, "bf16", GemmVersion::Mma128) => "gemm_nt_each_mma128_bf16",
        (GemmLayout::Nt, "f32", GemmVersion::Mma64) => "gemm_nt_each_mma64_f32",
        (GemmLayout::Nt, "f32", GemmVersion::Mma128) => "gemm_nt_each_mma128_f32",
        _ => panic!("{layout:?} into {} by {version:?}", T::NAME),
    }
}

fn sum(device: &Arc<Device>, terms: &[Operands], mut c: SliceMut<bf16>, addends: Addends) -> Result<()> {
    let shapes: Vec<GemmShape> = terms.iter().map(|term| term.shape).collect();
    for Operands { a, b, shape: GemmShape { layout, m, n, k } } in terms {
        assert_eq!([a.len(), b.len(), c.len()], [m * k, n * k, m * n], "{shapes:?}");
        assert_eq!((*layout, *m, *n), (GemmLayout::Nn, shapes[0].m, shapes[0].n), "{shapes:?}");
    }
    let (GemmShape { m, n, .. }, whole) = (shapes[0], whole(&shapes));
    let output = wgmma::Output { c: &c, partials: None, addends, shape: whole };
    let Some(plan) = choose(device, terms, &[output]) else {
        for (i, Operands { a, b, shape }) in terms.iter().enumerate() {
            let addends = Addends { accumulate: addends.accumulate || i > 0, ..addends };
            Product { a: *a, b: *b, c: c.reborrow(), shape: *shape, addends }.run(device)?;
        }
        return Ok(());
    };
    let GemmPlan { version, splits } = plan;
    let tile = version.tile().expect("a version with tiles: no other has this layout");
    let mut memory = if splits > 1 { Some(partials(device, splits, whole)?) } else { None };
    let sums = memory.as_mut().map(|memory| memory.all(splits as usize * m * n));
    let alone = whole.cost(size_of::<bf16>()) + Cost::moved(addends.bytes(m * n, size_of::<bf16>()));
    let cost = if splits > 1 { whole.cost(4 * splits as usize) } else { alone };
    if let GemmVersion::Wgmma128 | GemmVersion::Wgmma256 = version {
        let output = wgmma::Output { c: &c, partials: sums.as_ref(), addends, shape: whole };
        wgmma::launch(device, terms, &[output], plan, cost)?;
    } else {
        let launch = Launch::new(
            "gemm",
            if version == GemmVersion::Mma64 { "gemm_nn_sum_mma64_bf16" } else { "gemm_nn_sum_mma128_bf16" },
            [size(tile.count(whole)), splits],
            MMA_BLOCK,
            cost,
        );
        let a = pointers(terms.iter().map(|term| term.a.into()));
        let b = pointers(terms.iter().map(|term| term.b.into()));
        let common = args![&c, sums.as_ref(), addends.accumulate as u32, size(m), size(n)];
        let arguments = [&a[..], &b, common, &sizes(shapes.iter().map(|shape| shape.k))].concat();
        // SAFETY: lengths fit the shapes, operands are aligned as the version asks, `sums` holds the sums of all parts; C is
        // borrowed mutably.
        unsafe { device.launch(launch, &arguments) }?;
    }
    if let Some(sums) = sums {
        combine(device, &sums, splits, &c, [m, n], addends)?;
    }
    Ok(())
}

pub(in crate::backend::cuda) fn linear_each<P: Precision>(
    device: &Arc<Device>,
    op: LinearEach<'_, Cuda<P>>,
) -> Result<()> {
    let LinearShape { tokens: m, inputs: k, .. } = op.shape();
    let products = op.layers.iter_mut().map(|Projection { w, bias, y }| Product {
        a: slice(&op.x),
        b: slice(w),
        shape: GemmShape { layout: GemmLayout::Tn, m, n: w.len() / k, k },
        c: slice_mut(y.reborrow()),
        addends: Addends { bias: bias.as_ref().map(slice), ..Addends::default() },
    });
    each(device, &products.collect::<Vec<_>>())
}

pub(in crate::backend::cuda) fn linear_backward_input_each<P: Precision>(
    device: &Arc<Device>,
    op: LinearBackwardInputEach<'_, Cuda<P>>,
) -> Result<()> {
    let LinearShape { tokens: m, inputs: n, .. } = op.shape();
    let terms = op.layers.iter().map(|InputGradient { dy, w }| Operands {
        a: slice(dy),
        b: slice(w),
        shape: GemmShape { layout: GemmLayout::Nn, m, n, k: w.len() / n },
    });
    let addends = Addends { accumulate: op.accumulate, ..Addends::default() };
    sum(device, &terms.collect::<Vec<_>>(), slice_mut(op.dx), addends)
}

pub(in crate::backend::cuda) fn linear_backward_weight_each<P: Precision>(
    device: &Arc<Device>,
    op: LinearBackwardWeightEach<'_, Cuda<P>>,
) -> Result<()> {
    let (accumulate, LinearShape { tokens: k, inputs: n, .. }) = (op.accumulate, op.shape());
    let products = op.layers.iter_mut().map(|WeightGradient { dy, dw }| Product {
        a: slice(dy),
        b: slice(&op.x),
        shape: GemmShape { layout: GemmLayout::Nt, m: dw.len() / n, n, k },
        c: slice_mut(dw.reborrow()),
        addends: Addends { accumulate, ..Addends::default() },
    });
    each(device, &products.collect::<Vec<_>>())
}
