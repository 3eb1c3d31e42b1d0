//! Rotary position embedding.

use super::*;

pub(super) fn rotates_and_turns_back<B: Backend>(b: &B) {
    for (tokens, heads, head_dim) in [(1, 1, 2), (7, 3, 16), (33, 9, 64), (5, 2, 80), (300, 2, 128)] {
        let half = head_dim / 2;
        let length = 64;
        let angle = |p: usize, i: usize| p as f64 * 10_000f64.powf(-(i as f64) / half as f64);
        let table: Vec<f64> = (0..length)
            .flat_map(|p| (0..half).map(move |i| angle(p, i).cos()).chain((0..half).map(move |i| angle(p, i).sin())))
            .collect();
        let table = put::<B, f32>(b, &table);
        let positions: Vec<u32> = (0..tokens).map(|t| (t * 7 % length) as u32).collect();
        let on_device = put_u32(b, &positions);
        let mut x = put::<B, B::Float>(b, &normals(1, tokens * heads * head_dim));
        let mut exact = x.host.clone();
        for (h, head) in exact.chunks_mut(head_dim).enumerate() {
            let row = &table.host[positions[h / heads] as usize * head_dim..][..head_dim];
            for i in 0..half {
                let (a, b, c, s) = (head[i], head[i + half], row[i], row[i + half]);
                head[i] = a * c - b * s;
                head[i + half] = b * c + a * s;
            }
        }
        let what = format!("{tokens} × {heads} × {head_dim}");
        Rope {
            x: x.device.view_mut(),
            table: table.device.view(),
            positions: on_device.view(),
            head_dim,
            inverse: false,
        }
        .run(b)
        .unwrap();
        assert_close::<B>(&get(b, &x.device), &exact, 1e-6, &what);
        Rope {
            x: x.device.view_mut(),
            table: table.device.view(),
            positions: on_device.view(),
            head_dim,
            inverse: true,
        }
        .run(b)
        .unwrap();
        assert_close::<B>(&get(b, &x.device), &x.host, 2e-6, &what);
    }
}

on_every_backend!(rotates_and_turns_back);
