//! The kernels that the wrappers would not choose for these tensors, asked for by name, in the tests of those that they
//! do.

use super::*;
use swat::backend::cuda::{Bf16State, Cuda, F32State, Precision, with_version};

fn baselines_of<P: Precision>(b: &Cuda<P>) {
    with_version("baseline", || {
        rmsnorm::forward(b);
        rmsnorm::backward(b);
        rope::rotates_and_turns_back(b);
        swiglu::forward_and_backward(b);
        embedding::gather_and_scatter(b);
        embedding::backward_adds_repeated_rows(b);
        cross_entropy::loss_and_gradient(b);
        cross_entropy::far_logits_stay_finite(b);
        cross_entropy::a_broken_row_is_not_hidden(b);
        sampling::greedy_takes_the_first_of_equals(b);
        sampling::wide_nucleus(b);
    });
}

#[test]
fn baselines() {
    standin::open::<F32State>(0).iter().for_each(baselines_of);
    standin::open::<Bf16State>(3).iter().for_each(baselines_of);
}

#[test]
fn rows_in_wider_kernels_than_they_need() {
    for version in ["warp", "row1024", "row2048", "row4096", "row8192"] {
        let run = |b: &Cuda<F32State>| {
            with_version(version, || {
                rmsnorm::forward(b);
                rmsnorm::backward(b);
                rmsnorm::many_rows(b);
            });
        };
        standin::open(0).iter().for_each(run);
        standin::open(1).iter().for_each(run);
    }
}

/// A version by its name is that kernel.
#[test]
fn versions_are_the_kernels_of_their_names() {
    let Some(b) = standin::open::<F32State>(2) else { return };
    let [x, weight, mut y] = [(64 * 128, 1), (128, 2), (64 * 128, 3)]
        .map(|(len, stream)| put::<_, half::bf16>(&b, &normals(stream, len)).device);
    let mut kernels = |version| {
        let recording = swat::backend::trace::record().expect("no recording runs on this thread");
        with_version(version, || {
            RmsNorm { x: x.view(), weight: weight.view(), y: y.view_mut(), rstd: None, eps: 1e-5 }.run(&b)
        })
        .unwrap();
        b.synchronize().unwrap();
        recording.take().iter().map(|span| span.name).filter(|name| name.starts_with("rmsnorm_")).collect::<Vec<_>>()
    };
    for (version, kernel) in [
        ("baseline", "rmsnorm_forward_baseline_bf16"),
        ("warp", "rmsnorm_forward_warp_bf16"),
        ("row4096", "rmsnorm_forward_row4096_bf16"),
        ("vec8", "rmsnorm_forward_lanes_bf16"),
    ] {
        assert!(kernels(version).contains(&kernel), "{version}");
    }
}

/// Versions of attention's kernels, forward and, where asked for, backward, for heads of 64 of one document.
fn attention_versions(
    b: &Cuda<F32State>,
    heads: usize,
    tokens: usize,
    version: Option<&'static str>,
    backward: bool,
) -> Vec<&'static str> {
    let tensor = |heads: usize| put::<_, half::bf16>(b, &normals(1, heads * tokens * 64)).device;
    let (q, [k, v], mut o, mut lse) =
        (tensor(heads), [tensor(1), tensor(1)], tensor(heads), put::<_, f32>(b, &normals(1, heads * tokens)).device);
    let (mut dq, [mut dk, mut dv]) = (tensor(heads), [tensor(1), tensor(1)]);
    let documents = documents(b, &[tokens]);
    let shape = AttentionShape { heads, kv_heads: 1, head_dim: 64, scale: 0.125, window: None };
    let recording = swat::backend::trace::record().expect("no recording runs on this thread");
    let mut run = || {
        let (qv, kv, vv) = (q.view(), k.view(), v.view());
        Attention { q: qv, k: kv, v: vv, o: o.view_mut(), lse: Some(lse.view_mut()), shape, documents: &documents }
            .run(b)
            .unwrap();
        if !backward {
            return;
        }
        AttentionBackward {
            q: q.view(),
            k: k.view(),
            v: v.view(),
            o: o.view(),
            lse: lse.view(),
            d_o: q.view(),
            dq: dq.view_mut(),
            dk: dk.view_mut(),
            dv: dv.view_mut(),
            shape,
            documents: &documents,
        }
        .run(b)
        .unwrap();
    };
    match version {
        Some(version) => with_version(version, run),
        None => run(),
    }
    b.synchronize().unwrap();
    let names = recording.take().iter().map(|span| span.name).collect::<Vec<_>>();
    let kernels = ["attention_forward_", "attention_backward_query_", "attention_backward_key_"];
    let version = |name: &&'static str| kernels.iter().find_map(|kernel| name.strip_prefix(kernel)?.split('_').next());
    names.iter().filter_map(version).collect()
}

/// Attention takes Hopper's kernels where their blocks reach all multiprocessors, and where they are asked for.
#[test]
fn attention_chooses_by_device_and_blocks() {
    for ordinal in [0, 2] {
        let Some(b) = standin::open::<F32State>(ordinal) else { return };
        let or_wgmma = |other| if b.capability() == (9, 0) { "wgmma" } else { other };
        let mut cases = vec![
            (1, 1, None, vec!["flash64", "flash", "flash"]),
            (1, 1, Some("wgmma"), [or_wgmma("flash64"), or_wgmma("flash"), or_wgmma("flash")].to_vec()),
            (1, 1, Some("baseline"), vec!["baseline"; 3]),
            (1, 200, Some("flash128"), vec!["flash128"]),
            (300, 1, None, vec![or_wgmma("flash128")]),
        ];
        // The stand-in's have 132 multiprocessors, or 108.
        if !standin::real() {
            cases.push((65, 129, None, vec!["flash64"]));
            cases.push((66, 129, None, vec![or_wgmma("flash64")]));
            cases.push((66, 129, Some("flash64"), vec!["flash64"]));
        }
        for (heads, tokens, version, versions) in cases {
            let got = attention_versions(&b, heads, tokens, version, versions.len() > 1);
            assert_eq!(got, versions, "{heads} heads, {tokens} tokens, {version:?}, device {ordinal}");
        }
    }
}
