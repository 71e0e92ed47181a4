//! Shrinking: removes operations from a failing schedule as long as it still fails in the same way (delta debugging:
//! halves first, single operations last).

use super::ops::Op;

/// The smallest list found for which `fails` still holds.
pub(super) fn shrink(ops: &[Op], mut fails: impl FnMut(&[Op]) -> bool) -> Vec<Op> {
    let mut kept = ops.to_vec();
    let mut chunk = kept.len().div_ceil(2);
    while chunk > 0 {
        let mut at = 0;
        let mut shorter = false;
        while at < kept.len() {
            let end = kept.len().min(at + chunk);
            let without = [&kept[..at], &kept[end..]].concat();
            if fails(&without) {
                kept = without;
                shorter = true;
            } else {
                at = end;
            }
        }
        if chunk > 1 || !shorter {
            chunk /= 2;
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_needed_is_kept_and_nothing_else() {
        let mut ops = vec![Op::Session; 40];
        ops[7] = Op::Stop;
        ops[31] = Op::Cont;
        let needs = |ops: &[Op]| ops.contains(&Op::Stop) && ops.contains(&Op::Cont);
        assert_eq!(shrink(&ops, needs), [Op::Stop, Op::Cont]);
    }
}
