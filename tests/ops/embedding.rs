//! Rows gathered, scattered, and added.

use super::*;

/// (rows chosen, rows of the table, width)
const SIZES: [(usize, usize, usize); 4] = [(1, 1, 1), (5, 9, 17), (300, 40, 64), (129, 1000, 576)];

pub(super) fn gather_and_scatter<B: Backend>(b: &B) {
    for (count, rows, width) in SIZES {
        let count = count.min(rows);
        let table = put::<B, B::Float>(b, &normals(1, rows * width));
        let mut chosen: Vec<u32> = (0..rows as u32).collect();
        Philox::new(5, 0).shuffle(&mut chosen);
        chosen.truncate(count);
        let on_device = put_u32(b, &chosen);
        let mut picked = put::<B, B::Float>(b, &vec![f64::NAN; count * width]);
        GatherRows { from: table.device.view(), rows: on_device.view(), to: picked.device.view_mut(), width }
            .run(b)
            .unwrap();
        let exact: Vec<f64> =
            chosen.iter().flat_map(|row| table.host[*row as usize * width..][..width].to_vec()).collect();
        assert_eq!(get(b, &picked.device), exact);
        let mut back = put::<B, B::Float>(b, &vec![0.5; rows * width]);
        ScatterRows { from: picked.device.view(), rows: on_device.view(), to: back.device.view_mut(), width }
            .run(b)
            .unwrap();
        let back = get(b, &back.device);
        for row in 0..rows {
            let got = &back[row * width..][..width];
            match chosen.contains(&(row as u32)) {
                true => assert_eq!(got, &table.host[row * width..][..width], "row {row}"),
                false => assert!(got.iter().all(|x| *x == 0.5), "row {row}"),
            }
        }
    }
}

pub(super) fn repeated_rows_are_added<B: Backend>(b: &B) {
    for (count, rows, width) in SIZES {
        let mut rng = Philox::new(6, 0);
        let chosen: Vec<u32> = (0..count).map(|_| rng.below(rows) as u32).collect();
        let from = put::<B, B::Float>(b, &normals(1, count * width));
        let mut table = put::<B, B::Float>(b, &normals(2, rows * width));
        let mut exact = table.host.clone();
        for (from, row) in from.host.chunks(width).zip(&chosen) {
            exact[*row as usize * width..][..width].iter_mut().zip(from).for_each(|(e, x)| *e += x);
        }
        let on_device = put_u32(b, &chosen);
        AddRows { from: from.device.view(), rows: on_device.view(), to: table.device.view_mut(), width }
            .run(b)
            .unwrap();
        assert_close::<B>(&get(b, &table.device), &exact, 1e-5, &format!("{count} of {rows} × {width}"));
    }
}

pub(super) fn backward_adds_repeated_rows<B: Backend>(b: &B) {
    for (count, rows, width) in SIZES {
        let mut rng = Philox::new(6, 0);
        let chosen: Vec<u32> = (0..count).map(|_| rng.below(rows) as u32).collect();
        let dy = put::<B, B::Float>(b, &normals(1, count * width));
        let mut table = put::<B, B::Grad>(b, &normals(2, rows * width));
        let mut exact = table.host.clone();
        for (dy, row) in dy.host.chunks(width).zip(&chosen) {
            exact[*row as usize * width..][..width].iter_mut().zip(dy).for_each(|(e, d)| *e += d);
        }
        let on_device = put_u32(b, &chosen);
        EmbeddingBackward { dy: dy.device.view(), rows: on_device.view(), dtable: table.device.view_mut(), width }
            .run(b)
            .unwrap();
        assert_close::<B>(&get(b, &table.device), &exact, 1e-5, &format!("{count} of {rows} × {width}"));
    }
}

on_every_backend!(gather_and_scatter, repeated_rows_are_added, backward_adds_repeated_rows);
