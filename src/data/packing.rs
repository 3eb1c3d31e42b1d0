//! Packs examples into rows.

/// Examples packed at a time: enough to fill rows well, few enough to search all open rows.
const WINDOW: usize = 1024;

/// Packs whole examples into rows of `max_length` tokens, [`WINDOW`] examples of `order` at a time, by first fit
/// decreasing (Johnson, 1973). Within a window, rows and their examples are sorted back into `order`. An example longer
/// than `max_length` gets a row of its own.
pub(super) fn pack(lengths: &[usize], order: &[usize], max_length: usize) -> Vec<Vec<usize>> {
    order.chunks(WINDOW).flat_map(|window| pack_window(lengths, window, max_length)).collect()
}

fn pack_window(lengths: &[usize], window: &[usize], max_length: usize) -> Vec<Vec<usize>> {
    let length = |place: usize| window.get(place).and_then(|e| lengths.get(*e)).copied().unwrap_or(0);
    let mut places: Vec<usize> = (0..window.len()).collect();
    places.sort_by_key(|p| std::cmp::Reverse(length(*p)));
    let mut rows: Vec<(usize, Vec<usize>)> = Vec::new();
    for place in places {
        let length = length(place);
        match rows.iter_mut().find(|(room, _)| *room >= length) {
            Some((room, row)) => {
                *room -= length;
                row.push(place);
            }
            None => rows.push((max_length.saturating_sub(length), vec![place])),
        }
    }
    let mut rows: Vec<Vec<usize>> = rows.into_iter().map(|(_, row)| row).collect();
    rows.iter_mut().for_each(|row| row.sort_unstable());
    rows.sort_unstable();
    rows.into_iter().map(|row| row.into_iter().filter_map(|p| window.get(p).copied()).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn long_examples_come_first_and_gaps_are_filled() {
        let rows = pack(&[3, 7, 5, 2, 10, 3], &[0, 1, 2, 3, 4, 5], 10);
        assert_eq!(rows, [vec![0, 1], vec![2, 3, 5], vec![4]]);
    }

    proptest! {
        #[test]
        fn rows_hold_every_example_once_and_never_too_much(
            lengths in proptest::collection::vec(1usize..60, 1..2500),
            max_length in 1usize..80,
        ) {
            let order: Vec<usize> = (0..lengths.len()).rev().collect();
            let rows = pack(&lengths, &order, max_length);
            let mut seen: Vec<usize> = rows.iter().flatten().copied().collect();
            seen.sort_unstable();
            prop_assert!(seen.into_iter().eq(0..lengths.len()));
            for row in &rows {
                let sum: usize = row.iter().map(|e| lengths[*e]).sum();
                prop_assert!(sum <= max_length || row.len() == 1);
            }
            // Two rows of a window that fit into one would contradict first fit.
            if lengths.len() <= WINDOW {
                let sums = rows.iter().map(|row| row.iter().map(|e| lengths[*e]).sum::<usize>());
                prop_assert!(sums.filter(|s| 2 * s <= max_length).count() <= 1);
            }
        }
    }
}
